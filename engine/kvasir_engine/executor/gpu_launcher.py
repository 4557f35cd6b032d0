"""Launches steps into a GPU's stream one after another, and waits for a step only when its results are needed.

The tokens that a step samples stay on the GPU, where the next step reads them by row. All copies to the GPU are
from page-locked memory, so the host can prepare a step while the previous one runs.

With several ranks rank 0 samples, and broadcasts the tokens to the GPUs of the others. These have the same logits
and could sample too, but a sum in another order could give another token, and nothing would detect that.
"""

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch

from kvasir_engine.attention.base import AttentionBackend
from kvasir_engine.executor.cuda_graphs import DecodeGraphs
from kvasir_engine.forward_batch import ForwardBatch
from kvasir_engine.model.decoder import Decoder, OtherRows
from kvasir_engine.model.tensor_parallel import ALONE, ProcessGroup
from kvasir_engine.pinned_memory import staged
from kvasir_engine.sampling.device_sampler import QueuedSample, queue_sample
from kvasir_engine.sampling.prompt_scores import SLICE, PromptScores
from kvasir_engine.sampling.sampler import Sampled, SampleRequest
from kvasir_engine.supervisor import end_process, start_thread

log = logging.getLogger("model")


class StreamEvent(Protocol):
    """An event in the stream, such as torch.cuda.Event."""

    def record(self) -> None:
        """Record the event behind all queued work."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has reached the event."""
        ...

    def elapsed_time(self, other: "StreamEvent", /) -> float:
        """The milliseconds from this event to `other`. The device has to have reached both."""
        ...


def cuda_event() -> StreamEvent:
    """A CUDA event with timing, for which a thread sleeps instead of spinning."""
    event: StreamEvent = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call,assignment]
    return event


class LayerWatch:
    """Calls back, on a thread of its own, when the device has computed a layer. `event` creates events."""

    def __init__(self, event: Callable[[], StreamEvent]) -> None:
        self._event = event
        self._marks: queue.SimpleQueue[tuple[StreamEvent, Callable[[], None]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def mark(self, callback: Callable[[], None]) -> None:
        """Call `callback` when the device has done all work that is queued now. Callbacks come in order."""
        if self._thread is None:
            self._thread = start_thread(self._run, "kvasir-layers", end_process)
        mark = self._event()
        mark.record()
        self._marks.put((mark, callback))

    def _run(self) -> None:
        while True:
            mark, callback = self._marks.get()
            try:
                mark.synchronize()
                callback()
            except Exception:  # the step's own wait fails too, where it is the device that failed
                log.exception("the callback of a layer failed")


class GpuStep:
    """A LaunchedStep in a GPU's stream."""

    def __init__(
        self,
        sample: QueuedSample,
        scores: PromptScores | None,
        replayed: bool,
        before: StreamEvent | None,
        began: StreamEvent,
        ended: StreamEvent,
        layers_reported: threading.Event | None,
    ) -> None:
        self.sample = sample
        self._scores = scores
        self.replayed = replayed
        self.ended = ended
        self._before = before
        self._began = began
        self._layers_reported = layers_reported
        self._gap: float | None = None

    def wait(self) -> Sampled:
        """See LaunchedStep."""
        self.ended.synchronize()
        if self._layers_reported is not None:
            self._layers_reported.wait()
        if self._before is not None:
            self._gap = max(0.0, self._before.elapsed_time(self._began) / 1e3)
            self._before = None
        sampled = self.sample.collect()
        return sampled if self._scores is None else replace(sampled, prompts=self._scores.collect())

    @property
    def gap(self) -> float | None:
        """See LaunchedStep."""
        return self._gap


def other_rows(batch: ForwardBatch, device: torch.device, scores: PromptScores | None) -> OtherRows | None:
    """The `scored` rows of a batch for the model. All ranks compute their logits; `scores` is rank 0's."""
    if not batch.scored:
        return None
    places = torch.tensor([place for place, _, _ in batch.scored])
    take = _take_nothing if scores is None else scores.take
    return OtherRows(staged(places, device), SLICE, take)


def _take_nothing(logits: torch.Tensor) -> None:
    pass


@dataclass(frozen=True)
class Prepared:
    """A step whose inputs are being copied. `compute` queues its kernels and returns the logits [S, vocab]."""

    compute: Callable[[], torch.Tensor]
    replayed: bool


class GpuLauncher:
    """Launches the steps of one model from one thread: by `graphs` where they fit, else kernel by kernel."""

    def __init__(
        self,
        model: Decoder,
        attention: AttentionBackend,
        device: torch.device,
        layers: int,
        event: Callable[[], StreamEvent] = cuda_event,
        graphs: DecodeGraphs | None = None,
        group: ProcessGroup = ALONE,
    ) -> None:
        self._graphs = graphs
        self._group = group
        self._model = model
        self._attention = attention
        self._device = device
        self._layers = layers
        self._event = event
        self._watch = LayerWatch(event)
        self._last: GpuStep | None = None
        self._sampled: torch.Tensor | None = None

    @torch.inference_mode()
    def launch(
        self,
        batch: ForwardBatch,
        places: Sequence[int],
        requests: Sequence[SampleRequest],
        on_layer: Callable[[int], None] | None = None,
    ) -> GpuStep:
        """See ModelRunner."""
        last = self._last
        began, ended = self._event(), self._event()
        layers_reported = None if on_layer is None else threading.Event()
        scores = PromptScores(batch.scored, self._device) if batch.scored else None
        prepared = self.prepare(batch, self._hook(on_layer, layers_reported), scores)
        began.record()
        logits = prepared.compute()
        if len(places) < len(batch.query_lens):
            logits = logits.index_select(0, staged(torch.tensor(places, dtype=torch.int64), self._device))
        sample = queue_sample(logits, requests, self._sampled)
        self._share(sample.tokens)
        if scores is not None:
            scores.finish()
        ended.record()
        before = None if last is None else last.ended
        self._last = GpuStep(sample, scores, prepared.replayed, before, began, ended, layers_reported)
        return self._last

    @torch.inference_mode()
    def follow(self, count: int) -> None:
        """On another rank, after a step: receive the `count` tokens that rank 0 samples."""
        self._share(torch.empty(count, dtype=torch.int64, device=self._device))

    def _share(self, tokens: torch.Tensor) -> None:
        """Give every rank the tokens [S] that rank 0 has sampled, for the next step."""
        if len(tokens):
            self._group.broadcast(tokens)
        self._sampled = tokens

    def prepare(
        self,
        batch: ForwardBatch,
        on_layer: Callable[[int], None] | None = None,
        scores: PromptScores | None = None,
    ) -> Prepared:
        """Plan a step and copy its inputs. `on_layer` is called when each layer is queued, and `scores` gets the
        logits of the `scored` rows; graphs support neither.
        """
        device = self._device
        sampled = self._sampled
        if self._graphs is not None and on_layer is None and not batch.scored and self._graphs.takes(batch):
            return Prepared(self._graphs.stage(batch, sampled), replayed=True)
        self._attention.plan(batch)
        tokens, positions = staged(batch.tokens, device), staged(batch.positions, device)
        ends = staged(torch.tensor(batch.query_lens).cumsum(0) - 1, device)
        if batch.awaited:
            assert sampled is not None, "nothing was sampled before"
            where, rows = staged(torch.tensor(batch.awaited).T.contiguous(), device)
            tokens = tokens.index_copy(0, where, sampled.index_select(0, rows))
        others = other_rows(batch, device, scores)
        forward = partial(self._model.forward, tokens, positions, ends, self._attention, on_layer, others=others)
        return Prepared(forward, replayed=False)

    def _hook(
        self, on_layer: Callable[[int], None] | None, layers_reported: threading.Event | None
    ) -> Callable[[int], None] | None:
        if on_layer is None or layers_reported is None:
            return None

        def mark(layer: int) -> None:
            def report() -> None:
                try:
                    on_layer(layer)
                finally:
                    if layer == self._layers - 1:
                        layers_reported.set()

            self._watch.mark(report)

        return mark
