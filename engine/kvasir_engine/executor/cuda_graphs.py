"""Decode steps as CUDA graphs: the kernels of a whole forward pass launched by one call.

A decode step has about 20 short kernels a layer, and the host launches them more slowly than the device computes
them. Graphs for some batch sizes are captured when the model is loaded. A step of one new token a sequence is
padded to the next size and replayed; any other step is launched kernel by kernel. vLLM and SGLang do the same.

A graph reads and writes the addresses with which it was captured. So a step's inputs are copied into permanent
buffers (`staging`, in the stream after the previous step), and `Decoder.forward` and `GraphedAttention.run` may not
read memory that was allocated for one step. Sampling stays outside: its shapes differ from step to step with the
rows that are drawn, filtered or have log-probabilities, and it has few kernels, once a step.
"""

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial

import torch

from kvasir_engine.attention.base import AttentionBackend, GraphedAttention
from kvasir_engine.errors import ModelError
from kvasir_engine.forward_batch import ForwardBatch, decodes_only, padded
from kvasir_engine.model.decoder import Decoder
from kvasir_engine.model.loading.weight_loader import Progress
from kvasir_engine.pinned_memory import stage_into, staged

log = logging.getLogger("model")

Work = Callable[[], None]
Recorder = Callable[[Work], Work]
"""From work on the device to what does the same again, on the same memory."""


def capture_sizes(most: int) -> list[int]:
    """Batch sizes up to `most` in ascending order: 1, 2, 4, then multiples of 8, beyond 256 of 16, and `most`.

    This is vLLM's choice. Padding at most doubles small batches, whose cost is reading the weights, and adds little
    to large ones.
    """
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, most + 1, 16)]
    return [size for size in sizes if size < most] + [most]


def graph_memory(most: int, vocab: int) -> int:
    """Bytes to keep free for graphs of up to `most` sequences: SGLang's 2 MiB for each, and the logits."""
    return most * (2 << 20) + most * vocab * 4


def why_not(attention: AttentionBackend, model: Decoder) -> str | None:
    """Why steps on a GPU cannot be captured, or `None`."""
    if not isinstance(attention, GraphedAttention):
        return "attention by torch waits for the device; FlashInfer's does not"
    if model.waits:
        return "its mixture of experts waits for the device in each layer; in bfloat16 it does not"
    return None


class CudaRecorder:
    """Captures CUDA graphs. They share one memory pool, since only one is replayed at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._memory = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> Work:
        """See Recorder."""
        stream = self._stream
        # What is compiled, allocated or chosen at first (by FlashInfer, cuBLAS and NCCL, for this stream) must not
        # be when the stream is captured: so twice before.
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                work()
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog asks for events from a thread of its own, which in the mode "global" ends the capture.
        with torch.cuda.graph(graph, pool=self._memory, stream=stream, capture_error_mode="thread_local"):
            work()
        replay: Work = graph.replay
        return replay


class DecodeGraphs:
    """The graphs of one model over one pool with a scratch page, for batches of `sizes` sequences in ascending
    order.

    All ranks of a model capture the same graphs in the same order, and replay the same ones, since the graphs
    contain the ranks' exchanges. `ready` waits until every rank has planned once, which may compile FlashInfer.
    Raises ModelError if a capture fails, for example for lack of memory.
    """

    def __init__(
        self,
        model: Decoder,
        attention: GraphedAttention,
        device: torch.device,
        sizes: Sequence[int],
        vocab: int,
        max_positions: int,
        record: Recorder,
        ready: Callable[[], None],
        progress: Progress | None = None,
    ) -> None:
        pool, most = attention.pool, sizes[-1]
        assert pool.scratch is not None, "padding needs a page of its own"
        self._model = model
        self._attention = attention
        self._sizes = sizes
        self._scratch = pool.scratch
        longest = min(pool.pages, -(-max_positions // pool.page_size))
        try:
            self._tokens, self._positions = (torch.zeros(most, dtype=torch.int64, device=device) for _ in range(2))
            self._ends = torch.arange(most, device=device)
            self._logits = torch.zeros(most, vocab, device=device)
            attention.prepare_graphs(sizes, longest)
        except RuntimeError as error:
            raise _refused(most, error) from error
        self._replays = self._capture(longest, record, ready, progress)

    @torch.inference_mode()
    def _capture(
        self, longest: int, record: Recorder, ready: Callable[[], None], progress: Progress | None
    ) -> dict[int, Work]:
        replays: dict[int, Work] = {}
        for size in reversed(self._sizes):  # the largest first: the others fit into its memory
            try:
                # The plan of the longest contexts, and then that of the shortest, which is computed.
                for pages in (longest, 1):
                    self._attention.plan_graph(self._empty(size, pages))
                if not replays:
                    ready()
                replays[size] = record(partial(self._forward, size))
            except RuntimeError as error:
                raise _refused(size, error) from error
            if progress is not None:
                progress("capture", len(replays), len(self._sizes))
        return replays

    def _empty(self, size: int, pages: int) -> ForwardBatch:
        """A batch of padding, in which each sequence has so many times the scratch page."""
        length = (pages - 1) * self._attention.pool.page_size + 1
        table = torch.full((size, pages), self._scratch)
        tokens, positions = torch.zeros(size, dtype=torch.int64), torch.full((size,), length - 1)
        return ForwardBatch(tokens, positions, [1] * size, [length] * size, table)

    def _forward(self, size: int) -> None:
        """The forward pass that is captured."""
        self._model.forward(
            self._tokens[:size],
            self._positions[:size],
            self._ends[:size],
            self._attention,
            out=self._logits[:size],
        )

    def takes(self, batch: ForwardBatch) -> bool:
        """Whether there is a graph for `batch`."""
        return len(batch.query_lens) <= self._sizes[-1] and decodes_only(batch)

    def stage(self, batch: ForwardBatch, sampled: torch.Tensor | None) -> Callable[[], torch.Tensor]:
        """Write the inputs of `batch`, which awaits rows of `sampled`, and return what computes it.

        The logits, [S, vocab] in float32, stay until the next step computes.
        """
        count = len(batch.query_lens)
        size = self._sizes[bisect_left(self._sizes, count)]
        whole = padded(batch, size, self._scratch)
        self._attention.plan_graph(whole)
        stage_into(self._tokens[:size], whole.tokens)
        stage_into(self._positions[:size], whole.positions)
        if batch.awaited:
            assert sampled is not None, "nothing was sampled before"
            where, rows = staged(torch.tensor(batch.awaited).T.contiguous(), self._tokens.device)
            self._tokens.index_copy_(0, where, sampled.index_select(0, rows))
        replay, logits = self._replays[size], self._logits[:count]

        def compute() -> torch.Tensor:
            replay()
            return logits

        return compute


def captured(
    model: Decoder,
    attention: GraphedAttention,
    device: torch.device,
    most: int,
    vocab: int,
    max_positions: int,
    ready: Callable[[], None],
    progress: Progress | None,
) -> DecodeGraphs:
    """Capture DecodeGraphs for up to `most` sequences on a GPU, and log their time and memory. Raises
    ModelError."""
    sizes = capture_sizes(most)
    began, (free, _) = time.monotonic(), torch.cuda.mem_get_info(device)
    with torch.cuda.device(device):
        graphs = DecodeGraphs(
            model, attention, device, sizes, vocab, max_positions, CudaRecorder(device), ready, progress
        )
        torch.cuda.synchronize(device)
    taken = free - torch.cuda.mem_get_info(device)[0]
    seconds = time.monotonic() - began
    log.info("captured CUDA graphs=%d largest=%d bytes=%d seconds=%.1f", len(sizes), most, taken, seconds)
    return graphs


def _refused(size: int, error: RuntimeError) -> ModelError:
    """The error of a failed capture. Mostly the device's memory, or FlashInfer's workspace, is too small."""
    memory = isinstance(error, torch.OutOfMemoryError)
    return ModelError(
        f"cannot capture the CUDA graph of {size} sequences: {str(error).splitlines()[0]}; "
        f"{'lower --kv-cache-memory, ' if memory else ''}lower --cuda-graph-max-bs, or use --enforce-eager"
    )
