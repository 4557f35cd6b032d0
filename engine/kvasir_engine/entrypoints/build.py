"""Builds an engine from the configuration: model, pool, limits, handoff."""

import logging
import os
import secrets
from collections.abc import Callable
from functools import partial
from pathlib import Path

from kvasir_engine import supervisor
from kvasir_engine.attention.registry import refuse_missing
from kvasir_engine.config import EngineConfig
from kvasir_engine.connector.digester import Digester
from kvasir_engine.connector.fabric_rate import fabric_rate, nic_rate
from kvasir_engine.connector.kv_connector import KVConnector
from kvasir_engine.connector.layout import spec_of
from kvasir_engine.connector.nixl_agent import NixlAgent, choose_fabric
from kvasir_engine.connector.rank_parts import Event
from kvasir_engine.connector.transfer_thread import TransferThread
from kvasir_engine.core.cached_page_checks import CachedPageChecks
from kvasir_engine.core.engine import Engine
from kvasir_engine.core.engine_thread import EngineThread
from kvasir_engine.core.scheduler import Limits
from kvasir_engine.core.waiting_queue import QueueLimits
from kvasir_engine.entrypoints.grammars import grammar_service
from kvasir_engine.errors import ModelError, UserError
from kvasir_engine.executor.fingerprint import fingerprint_of
from kvasir_engine.executor.model_runner import ModelRunner, runner_options
from kvasir_engine.executor.node_listener import NodeListener
from kvasir_engine.executor.node_protocol import Ended, NodeSettings
from kvasir_engine.executor.rank_group import RankedRunner, RankProcesses
from kvasir_engine.executor.rank_process import digester_of, region_of
from kvasir_engine.executor.rank_protocol import Serve
from kvasir_engine.executor.threads import apart, use_own_cores
from kvasir_engine.kv.digests import KeptDigests
from kvasir_engine.model.loading.resolver import resolve
from kvasir_engine.model.loading.weight_loader import choose_device
from kvasir_engine.model.models.registry import load_config
from kvasir_engine.model.tensor_parallel import ALONE, shard
from kvasir_engine.protocol import Fingerprint
from kvasir_engine.tls import Credentials
from kvasir_engine.transport_policy import TransportPolicy, place_here

log = logging.getLogger("worker")


def build(
    config: EngineConfig,
    moves_kv: bool,
    leave: Callable[[], None] = lambda: None,
    ended: supervisor.Ended | None = None,
    credentials: Credentials | None = None,
) -> tuple[EngineThread, KVConnector | None]:
    """Load the model, with the other nodes if there are any, and start the threads.

    `leave` is called when another node must end, `ended` when a thread has ended. Raises UserError for what the
    user can mend.
    """
    check(config)
    listener = None if config.nodes is None else NodeListener(config.nodes, leave, credentials)
    try:
        return _build(config, moves_kv, listener, ended)
    except UserError as error:
        if listener is not None:
            listener.broadcast(Ended(f"node 0 cannot start: {error}"))
        raise


def _build(
    config: EngineConfig,
    moves_kv: bool,
    listener: NodeListener | None,
    ended: supervisor.Ended | None,
) -> tuple[EngineThread, KVConnector | None]:
    folder = apart(lambda: resolve(config.model, config.revision or None, progress=log_progress()))
    max_length = load_config(folder).max_length(config.max_length)
    device = choose_device(config.device, 0, config.tensor_parallel, config.nnodes)
    threads = use_own_cores(config.tensor_parallel // config.nnodes, device.type)
    if listener is not None:
        listener.group = NodeSettings.of(config, folder)

    def report(rank: int, event: Event) -> None:
        thread.post(lambda engine: engine.reported(rank, event))

    runner, ranks = _load(config, folder, report, listener)
    if config.cuda_graph_max_bs and runner.no_graphs is not None:
        raise ModelError(f"cuda-graph-max-bs {config.cuda_graph_max_bs}: no CUDA graphs: {runner.no_graphs}")
    pool = runner.pool
    if config.max_length == 0:
        max_length = min(max_length, pool.pages * config.page_size)
    if pool.pages * config.page_size < max_length:
        raise ModelError(
            f"the KV pool holds {pool.pages * config.page_size} tokens, fewer than the maximum length {max_length}"
        )
    fingerprint = fingerprint_of(config, folder, runner.config, runner.dtype)
    epoch = secrets.randbits(63)
    if ranks is not None:
        ranks.start(Serve(epoch, fingerprint) if moves_kv else None)
    limits = Limits(config.prefill_chunk + config.max_running, config.max_running, config.page_size)
    handoff = None
    if moves_kv:
        choose_fabric(config.fabric, runner.device.type == "cuda", config.encryption)
        fabric = fabric_rate(config.fabric, runner.device.type == "cuda", os.environ, nic_rate())
        region = region_of(runner)
        digest = digester_of(runner, fingerprint) if config.kv_digests else None
        own = TransferThread(
            lambda: NixlAgent(epoch, region, fingerprint),
            lambda event: report(0, event),
            digest,
            ended=ended,
            fabric=fabric,
        )
        own.start()
        handoff = KVConnector(own, ranks)
    grammars = grammar_service(folder, runner.vocab, config.jump_forward == "on")
    overlap = config.overlap == "on" or (config.overlap == "auto" and runner.device.type == "cuda")
    thread = EngineThread(
        Engine(
            runner,
            config.role,
            limits,
            max_length,
            epoch,
            handoff,
            QueueLimits(config.max_waiting, config.queue_seconds),
            overlap=overlap,
            policy=TransportPolicy(config.encryption, place_here()),
            grammars=grammars,
            checks=_checks(config, runner, fingerprint, moves_kv),
        ),
        config.check_pages,
        ended,
    )
    thread.start()
    log.info(
        "engine ready role=%s dtype=%s device=%s threads=%d pages=%d page_bytes=%d max_length=%d overlap=%s "
        "largest_graph=%d",
        config.role,
        fingerprint.dtype,
        runner.device,
        threads,
        pool.pages,
        pool.page_bytes,
        max_length,
        overlap,
        0 if runner.no_graphs else config.largest_graph,
    )
    return thread, handoff


def check(config: EngineConfig) -> None:
    """Raise ModelError for a setting that this machine cannot have or does not need, before any download."""
    refuse_missing(config.attention_backend)
    asked = config.cuda_graph_max_bs
    if asked or config.enforce_eager:
        device = choose_device(config.device, 0, config.tensor_parallel, config.nnodes)
        if device.type != "cuda":
            flag = f"cuda-graph-max-bs {asked}" if asked else "enforce-eager"
            raise ModelError(f"{flag}: there are CUDA graphs on GPUs only")


def _checks(
    config: EngineConfig, runner: ModelRunner, fingerprint: Fingerprint, moves_kv: bool
) -> CachedPageChecks | None:
    """The checker of cached pages before reuse. Raises ModelError where the pool cannot be checked."""
    mode, pool = config.verify_cached_pages, runner.pool
    if runner.device.type != "cpu":
        if mode in ("all", "sampled"):
            raise ModelError(f"verify-cached-pages {mode}: it is for CPUs, not for {runner.device.type}")
        return None
    if mode == "off" or (mode == "auto" and not moves_kv):
        return None
    kept = pool.digests or KeptDigests(pool.pages, len(pool.shape.layers), pool.page_size)
    digester = Digester(pool.address, pool.pages, spec_of(fingerprint, pool.page_bytes), kept)
    return CachedPageChecks(digester, kept, pool.digests is not None, "sampled" if mode == "sampled" else "all")


def _load(
    config: EngineConfig,
    folder: Path,
    report: Callable[[int, Event], None],
    listener: NodeListener | None,
) -> tuple[ModelRunner, RankProcesses | None]:
    """The model, or this process's part of it and the processes that have the other parts."""
    place, ranks = ALONE, None
    if config.tensor_parallel > 1:
        device = choose_device(config.device, 0, config.tensor_parallel, config.nnodes)
        shard(load_config(folder), 0, config.tensor_parallel)  # refused here, before there are processes
        ranks = RankProcesses(config, folder, report, listener)
        place = ranks.meet(device)
    load = partial(
        ModelRunner if ranks is None else partial(RankedRunner, ranks),
        folder,
        group=place,
        progress=log_progress(),
        **runner_options(config),
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
