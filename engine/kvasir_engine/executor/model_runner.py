"""The numeric engine: a model, its KV pool and its attention backend, one step at a time."""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kvasir_engine.attention.base import AttentionSpec, GraphedAttention
from kvasir_engine.attention.cpu_backend import CpuBackend
from kvasir_engine.attention.registry import choose_backend, refuse_missing
from kvasir_engine.config import BackendName, EngineConfig, Quantization
from kvasir_engine.cpu_kernels import unavailable_reason
from kvasir_engine.errors import ModelError
from kvasir_engine.executor.cuda_graphs import captured, graph_memory, why_not
from kvasir_engine.executor.gpu_launcher import GpuLauncher, other_rows
from kvasir_engine.executor.gpu_warm_up import KernelShape, log_kernels
from kvasir_engine.executor.step import FinishedStep, LaunchedStep
from kvasir_engine.forward_batch import ForwardBatch
from kvasir_engine.kv.digests import STRIPE, KeptDigests
from kvasir_engine.kv.pool import KVPool, PoolShape, free_memory
from kvasir_engine.model.decoder import Decoder
from kvasir_engine.model.layers import cpu
from kvasir_engine.model.loading.weight_loader import Progress, Weights, choose_device, choose_dtype
from kvasir_engine.model.models.registry import load_config
from kvasir_engine.model.tensor_parallel import ALONE, ProcessGroup, shard
from kvasir_engine.sampling.prompt_scores import PromptScores
from kvasir_engine.sampling.sampler import SampleRequest, sample

log = logging.getLogger("model")


def runner_options(config: EngineConfig) -> dict[str, Any]:
    """The arguments of a ModelRunner that follow from the configuration, the same on each rank."""
    return {
        "dtype": config.dtype,
        "device": config.device,
        "page_size": config.page_size,
        "kv_memory": config.kv_cache_memory,
        "gpu_sharers": config.gpu_sharers,
        "attention": config.attention_backend,
        "deterministic": config.deterministic,
        "quantization": config.quantization,
        "graphs": config.largest_graph,
    }


class ModelRunner:
    """Loads the model in `folder` and computes logits.

    `dtype` is `auto`, `bfloat16`, `float16` or `float32`; `device` is `auto`, `cpu` or `cuda`. The pool gets
    `pages` pages, or with `pages` 0 as many as `kv_memory` bytes, all ranks together, hold (0: see
    `default_kv_memory`); every rank has as many. `attention`: see `choose_backend`. With a `group` this process is
    one of several ranks, with its part of the weights and KV heads; all ranks get the same batches and compute the
    same logits. `progress` gets ("load", bytes, total bytes). `deterministic`: a token's logits and KV depend only
    on the tokens before it, to the last bit, and not on the batch, chunks or cached prefixes. `quantization`
    applies to the layers' weights, not to embeddings and head. `graphs`: steps of one new token for at most so many
    sequences are captured as CUDA graphs, where that is possible; `progress` gets ("capture", graphs, total
    graphs). Raises ModelError.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: str = "auto",
        device: str = "auto",
        page_size: int = 16,
        pages: int = 0,
        kv_memory: int = 0,
        gpu_sharers: int = 1,
        attention: BackendName = "auto",
        group: ProcessGroup = ALONE,
        deterministic: bool = False,
        quantization: Quantization = "none",
        graphs: int = 0,
        progress: Progress | None = None,
    ) -> None:
        refuse_missing(attention)
        self.config = load_config(folder)
        part = shard(self.config, group.rank, group.size)
        self.device = choose_device(device, group.rank, group.size, group.size // group.here)
        self.dtype = choose_dtype(dtype, self.device)
        if deterministic:
            _check_deterministic(self.device, self.dtype, group)
        if quantization == "int8":
            _check_int8(self.device, self.dtype, group)
        packing = cpu.int8() if quantization == "int8" else nullcontext()
        with torch.inference_mode(), cpu.only() if deterministic else nullcontext(), packing:
            weights = Weights(folder, self.dtype, self.device, progress, group.size)
            self._model = Decoder(self.config, weights, part, group)
            weights.close()
        config = self.config
        shape = PoolShape.uniform(config.layers, len(part.kv_heads), config.head_dim, page_size, self.dtype)
        # Outside inference mode, so that others may write into the pool outside it.
        scratch = graphs > 0 and self.device.type == "cuda"
        if not pages:
            kept = graph_memory(graphs, config.vocab) if scratch else 0
            memory = kv_memory // group.size or default_kv_memory(self.device, group.here, kept, gpu_sharers)
            group.loaded()
            counts = group.all_gather(torch.tensor([shape.pages_within(memory) - scratch], device=self.device))
            pages = int(counts.min())
        self.pool = KVPool(shape, pages, self.device, scratch)
        spec = AttentionSpec(len(part.heads), config.attention_scale, config.windows)
        self._attention = choose_backend(attention, self.pool, spec, deterministic)
        log.info("attention by %s", type(self._attention).__name__)
        self._sampled: list[int] = []
        self._launcher: GpuLauncher | None = None
        self.no_graphs: str | None = f"there are none on {self.device.type}"
        if self.device.type == "cuda":
            log_kernels(KernelShape.of(config, part, group.size, self.dtype, page_size), config.windows)
            self._launcher = self._launch_by(graphs, group, progress)
        if self.device.type == "cpu" and self.dtype == torch.bfloat16:
            reason = unavailable_reason()
            log.info("CPU kernels %s", "in use" if reason is None else f"not in use: {reason}")

    def _launch_by(self, graphs: int, group: ProcessGroup, progress: Progress | None) -> GpuLauncher:
        config, model, attention, found = self.config, self._model, self._attention, None
        self.no_graphs = why_not(attention, model) if graphs else "they were not asked for"
        if self.no_graphs is None and isinstance(attention, GraphedAttention):
            found = captured(
                model,
                attention,
                self.device,
                graphs,
                config.vocab,
                config.max_positions,
                group.loaded,
                progress,
            )
        else:
            log.info("no CUDA graphs: %s", self.no_graphs)
        return GpuLauncher(model, attention, self.device, config.layers, graphs=found, group=group)

    @property
    def vocab(self) -> int:
        """The columns of the logits."""
        return self.config.vocab

    @torch.inference_mode()
    def forward(
        self,
        batch: ForwardBatch,
        on_layer: Callable[[int], None] | None = None,
        scores: PromptScores | None = None,
    ) -> torch.Tensor:
        """The logits [S, vocab], float32, after each sequence of `batch`. The new tokens' KV is in the pool then.

        `scores`, if given, gets the logits of the `scored` rows. `on_layer` is called with each layer's number as
        soon as its KV is in the pool. On a GPU the logits of a graph are valid until the next step.
        """
        if self._launcher is None:
            self._attention.plan(batch)
            last = torch.tensor(batch.query_lens).cumsum(0) - 1
            others = other_rows(batch, self.device, scores)
            return self._model.forward(
                batch.tokens, batch.positions, last, self._attention, on_layer, others=others
            )
        # With `on_layer` kernel by kernel here too: all ranks of a step do the same.
        queued = None if on_layer is None else lambda layer: None
        logits = self._launcher.prepare(batch, queued, scores).compute()
        # On a GPU work is only queued: whoever reads the pool from outside its streams has to wait for all of it.
        torch.cuda.synchronize(self.device)
        if on_layer is not None:
            for layer in range(self.config.layers):
                on_layer(layer)
        return logits

    def launch(
        self,
        batch: ForwardBatch,
        places: Sequence[int],
        requests: Sequence[SampleRequest],
        on_layer: Callable[[int], None] | None = None,
    ) -> LaunchedStep:
        """Compute `batch` and sample the token after each of the sequences at `places`, as `requests` say.

        Steps and copies of pages are computed in the order of their launches. `on_layer` is as for `forward`, on
        any thread. On a CPU the step is done when this returns.
        """
        if self._launcher is not None:
            return self._launcher.launch(batch, places, requests, on_layer)
        if batch.awaited:
            tokens = batch.tokens.clone()
            for place, row in batch.awaited:
                tokens[place] = self._sampled[row]
            batch = replace(batch, tokens=tokens, awaited=())
        scores = PromptScores(batch.scored, self.device) if batch.scored else None
        logits = self.forward(batch, on_layer, scores)
        rows = logits if len(places) == len(logits) else logits[list(places)]
        sampled = sample(rows, requests, self._sampled)
        self._sampled = sampled.tokens
        if scores is not None:
            scores.finish()
            sampled = replace(sampled, prompts=scores.collect())
        return FinishedStep(sampled)

    def follow(self, batch: ForwardBatch, sampled: int, on_layer: Callable[[int], None] | None = None) -> None:
        """On ranks other than 0: compute the batch that rank 0 launches, as `forward`. On a GPU rank 0 samples
        `sampled` tokens after it."""
        self.forward(batch, on_layer)
        if self._launcher is not None:
            # Behind the wait: the next step's inputs are on their way while rank 0 samples.
            self._launcher.follow(sampled)

    def keep_digests(self) -> None:
        """Let the kernel that writes KV make its digests, if it can. Call this before the first step."""
        shape = self.pool.shape
        if isinstance(self._attention, CpuBackend) and shape.head_dim * shape.dtype.itemsize % STRIPE == 0:
            self.pool.digests = KeptDigests(self.pool.pages, len(shape.layers), shape.page_size)
            self._attention.keep(self.pool.digests)

    def copy_page(self, source: int, target: int) -> None:
        """Copy page `source` to page `target`."""
        self.pool.copy_page(source, target)

    def close(self) -> None:
        """End the computation of other processes for this one."""


def _check_deterministic(device: torch.device, dtype: torch.dtype, group: ProcessGroup) -> None:
    """Raise ModelError if no kernels here compute the same bits in any batch."""
    if device.type != "cpu":
        reason: str | None = f"it runs on CPUs, not on {device.type}"
    elif dtype != torch.bfloat16:
        reason = f"its kernels compute in bfloat16, not in {str(dtype).removeprefix('torch.')}"
    elif group.size > 2:
        reason = f"{group.size} ranks add up in an order that depends on the batch; it takes at most 2"
    else:
        reason = unavailable_reason()
    if reason is not None:
        raise ModelError(f"deterministic mode: {reason}")


def _check_int8(device: torch.device, dtype: torch.dtype, group: ProcessGroup) -> None:
    """Raise ModelError if no kernel here multiplies by int8 weights."""
    if device.type != "cpu":
        reason: str | None = f"it runs on CPUs, not on {device.type}"
    elif dtype != torch.bfloat16:
        reason = f"its inputs are bfloat16, not {str(dtype).removeprefix('torch.')}"
    elif group.size > 1:
        reason = f"it takes one rank, not {group.size}"
    else:
        reason = unavailable_reason()
    if reason is not None:
        raise ModelError(f"int8 quantization: {reason}")


def default_kv_memory(device: torch.device, ranks: int = 1, kept: int = 0, sharers: int = 1) -> int:
    """The default size of a rank's KV pool in bytes: on a GPU 90% of what is free beyond `kept`; on a host a
    quarter of the free memory, at most 4 GiB, for all its `ranks`.

    Several workers may share a host. A GPU belongs to this worker, or in equal parts to its `sharers`, whichever
    starts first.
    """
    free = max(0, (free_memory(device) if sharers == 1 else own_part(device, sharers)) - kept)
    return free * 9 // 10 if device.type == "cuda" else min(free // 4, 4 << 30) // ranks


CONTEXT_BYTES = 768 << 20
"""Of a GPU, for what a process has there beside torch's memory: CUDA's context, kernels, NIXL."""


def own_part(device: torch.device, sharers: int) -> int:
    """The bytes of a GPU that this process may still take, if `sharers` processes share it in equal parts."""
    free, total = torch.cuda.mem_get_info(device)
    return max(0, min(free, total // sharers - torch.cuda.memory_reserved(device) - CONTEXT_BYTES))
