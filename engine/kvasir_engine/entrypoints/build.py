"""Builds an engine from what the command line says: model, pool, limits, handoff."""

import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from kvasir_engine import supervisor
from kvasir_engine.attention.registry import BackendName, refuse_missing
from kvasir_engine.connector.fabric import Fabric
from kvasir_engine.connector.kv_connector import KVConnector
from kvasir_engine.connector.nixl_agent import NixlAgent, choose_fabric
from kvasir_engine.connector.rank_parts import Event
from kvasir_engine.connector.transfer_thread import TransferThread
from kvasir_engine.core.engine import NO_LIMITS, Engine
from kvasir_engine.core.engine_thread import EngineThread
from kvasir_engine.core.scheduler import Limits
from kvasir_engine.core.waiting_queue import QueueLimits
from kvasir_engine.errors import ModelError, UserError
from kvasir_engine.executor.cuda_graphs import MOST
from kvasir_engine.executor.model_runner import ModelRunner, Quantization
from kvasir_engine.executor.node_listener import NodeListener
from kvasir_engine.executor.node_protocol import Ended, Nodes, NodeSettings
from kvasir_engine.executor.rank_group import RankedRunner, RankProcesses
from kvasir_engine.executor.rank_process import digester_of, region_of
from kvasir_engine.executor.rank_protocol import Serve
from kvasir_engine.executor.threads import apart, use_own_cores
from kvasir_engine.kv.digests import NONE, TOKENS
from kvasir_engine.model.architectures import load_config
from kvasir_engine.model.loading.resolver import resolve
from kvasir_engine.model.loading.safetensors_files import weights_digest
from kvasir_engine.model.loading.weight_loader import choose_device
from kvasir_engine.model.tensor_parallel import ALONE, shard
from kvasir_engine.protocol import HEADS_APART, Fingerprint, Role

log = logging.getLogger("worker")


Overlap = Literal["auto", "on", "off"]
OVERLAPS: tuple[Overlap, ...] = get_args(Overlap)


@dataclass(frozen=True)
class EngineOptions:
    """What `kvasir worker` and `kvasir serve` have in common. `kv_cache_memory` in bytes, 0: from what is free.

    `cuda_graph_max_bs`: 0 for as many sequences as there can be in a batch, up to `cuda_graphs.MOST`.
    """

    model: str
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    attention_backend: BackendName = "auto"
    overlap: Overlap = "auto"
    enforce_eager: bool = False
    cuda_graph_max_bs: int = 0
    tensor_parallel: int = 1
    max_length: int = 0
    page_size: int = 16
    kv_cache_memory: int = 0
    max_running: int = 64
    prefill_chunk: int = 512
    fabric: Fabric = "auto"
    kv_digests: bool = True
    gpu_sharers: int = 1
    check_pages: bool = False
    deterministic: bool = False
    quantization: Quantization = "none"
    queue: QueueLimits = NO_LIMITS
    nodes: Nodes | None = None

    @property
    def node_count(self) -> int:
        """Machines that the ranks are divided among."""
        return 1 if self.nodes is None else self.nodes.count


def build(
    options: EngineOptions,
    role: Role,
    moves_kv: bool,
    leave: Callable[[], None] = lambda: None,
    ended: supervisor.Ended | None = None,
) -> tuple[EngineThread, KVConnector | None]:
    """Load the model, with the other nodes if there are any, and start the threads.

    `leave` hears that another node has to go, `ended` that a thread has ended. Raises UserError for what
    the user can mend.
    """
    check(options)
    graphs = graphs_of(options, role)
    listener = None if options.nodes is None else NodeListener(options.nodes, leave)
    try:
        return _build(options, graphs, role, moves_kv, listener, ended)
    except UserError as error:
        if listener is not None:
            listener.tell(Ended(f"node 0 cannot start: {error}"))
        raise


def _build(
    options: EngineOptions,
    graphs: int,
    role: Role,
    moves_kv: bool,
    listener: NodeListener | None,
    ended: supervisor.Ended | None,
) -> tuple[EngineThread, KVConnector | None]:
    folder = apart(lambda: resolve(options.model, options.revision, progress=log_progress()))
    max_length = load_config(folder).max_length(options.max_length)
    device = choose_device(options.device, 0, options.tensor_parallel, options.node_count)
    threads = use_own_cores(options.tensor_parallel // options.node_count, device.type)
    if listener is not None:
        listener.group = NodeSettings.of(options, role, folder)

    def report(rank: int, event: Event) -> None:
        thread.post(lambda engine: engine.reported(rank, event))

    runner, ranks = _load(options, graphs, folder, report, listener)
    if options.cuda_graph_max_bs and runner.no_graphs is not None:
        raise ModelError(f"cuda-graph-max-bs {options.cuda_graph_max_bs}: no CUDA graphs: {runner.no_graphs}")
    config, pool = runner.config, runner.pool
    if options.max_length == 0:
        max_length = min(max_length, pool.pages * options.page_size)
    if pool.pages * options.page_size < max_length:
        raise ModelError(
            f"the KV pool holds {pool.pages * options.page_size} tokens, fewer than the maximum length {max_length}"
        )
    fingerprint = Fingerprint(
        model=weights_digest(folder) + ("" if options.quantization == "none" else f"-{options.quantization}"),
        revision=options.revision or "",
        dtype=str(runner.dtype).removeprefix("torch."),
        layout=HEADS_APART,
        page_size=options.page_size,
        layers=config.layers,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        positions=config.positions,
        tensor_parallel=options.tensor_parallel,
        digest=TOKENS if options.kv_digests else NONE,
    )
    epoch = secrets.randbits(63)
    if ranks is not None:
        ranks.start(Serve(epoch, fingerprint, options.fabric, options.kv_digests) if moves_kv else None)
    limits = Limits(options.prefill_chunk + options.max_running, options.max_running, options.page_size)
    handoff = None
    if moves_kv:
        choose_fabric(options.fabric, runner.device.type == "cuda")
        region = region_of(runner)
        digest = digester_of(runner, fingerprint) if options.kv_digests else None
        own = TransferThread(
            lambda: NixlAgent(epoch, region, fingerprint), lambda event: report(0, event), digest, ended=ended
        )
        own.start()
        handoff = KVConnector(own, ranks)
    overlap = options.overlap == "on" or (options.overlap == "auto" and runner.device.type == "cuda")
    thread = EngineThread(
        Engine(runner, role, limits, max_length, epoch, handoff, options.queue, overlap=overlap),
        options.check_pages,
        ended,
    )
    thread.start()
    log.info(
        "engine ready role=%s dtype=%s device=%s threads=%d pages=%d page_bytes=%d max_length=%d overlap=%s "
        "largest_graph=%d",
        role,
        fingerprint.dtype,
        runner.device,
        threads,
        pool.pages,
        pool.page_bytes,
        max_length,
        overlap,
        0 if runner.no_graphs else graphs,
    )
    return thread, handoff


def check(options: EngineOptions) -> None:
    """Raise ModelError for options that no model makes right: before anything is downloaded."""
    refuse_missing(options.attention_backend)
    if options.gpu_sharers > 1 and options.tensor_parallel > 1:
        raise ModelError(f"gpu-sharers {options.gpu_sharers}: a worker that shares a GPU has one rank")
    if options.quantization != "none" and options.tensor_parallel > 1:
        raise ModelError(f"{options.quantization} quantization: it takes one rank, not {options.tensor_parallel}")


def graphs_of(options: EngineOptions, role: Role) -> int:
    """Sequences of the largest batch that is to be a CUDA graph; 0 for none. Raises ModelError."""
    asked = options.cuda_graph_max_bs
    if asked and options.enforce_eager:
        raise ModelError(f"cuda-graph-max-bs {asked} and enforce-eager: there are CUDA graphs or there are none")
    if asked > options.max_running:
        raise ModelError(f"cuda-graph-max-bs {asked} is more than max-running {options.max_running}")
    if asked and role == "prefill":
        raise ModelError(f"cuda-graph-max-bs {asked}: a prefill worker's steps are no CUDA graphs")
    if asked or options.enforce_eager:
        device = choose_device(options.device, 0, options.tensor_parallel, options.node_count)
        if device.type != "cuda":
            flag = f"cuda-graph-max-bs {asked}" if asked else "enforce-eager"
            raise ModelError(f"{flag}: there are CUDA graphs on GPUs only")
    if options.enforce_eager or role == "prefill":
        return 0
    return asked or min(options.max_running, MOST)


def _load(
    options: EngineOptions,
    graphs: int,
    folder: Path,
    report: Callable[[int, Event], None],
    listener: NodeListener | None,
) -> tuple[ModelRunner, RankProcesses | None]:
    """The model, or this process's part of it and the processes that have the other parts."""
    place, ranks = ALONE, None
    if options.tensor_parallel > 1:
        device = choose_device(options.device, 0, options.tensor_parallel, options.node_count)
        shard(load_config(folder), 0, options.tensor_parallel)  # refused here, before there are processes
        ranks = RankProcesses(
            options.tensor_parallel,
            folder,
            options.dtype,
            options.device,
            options.page_size,
            options.kv_cache_memory,
            options.deterministic,
            options.attention_backend,
            graphs,
            report,
            listener,
        )
        place = ranks.meet(device)
    load = partial(
        ModelRunner if ranks is None else partial(RankedRunner, ranks),
        folder,
        dtype=options.dtype,
        device=options.device,
        page_size=options.page_size,
        kv_memory=options.kv_cache_memory,
        gpu_sharers=options.gpu_sharers,
        attention=options.attention_backend,
        group=place,
        deterministic=options.deterministic,
        quantization=options.quantization,
        graphs=graphs,
        progress=log_progress(),
    )
    return apart(load), ranks


def log_progress() -> Callable[[str, int, int], None]:
    """A progress callback that logs a line at the start of a stage and each further tenth."""
    last: dict[str, int] = {}

    def progress(stage: str, done: int, total: int) -> None:
        tenth = 10 * done // total if total else 0
        if last.get(stage) != tenth:
            last[stage] = tenth
            log.info("progress stage=%s done=%d total=%d", stage, done, total)

    return progress
