"""Builds an engine from what the command line says: model, pool, limits, handoff."""

import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from kvasir_engine.model.runner import ModelRunner
from kvasir_engine.model.source import resolve
from kvasir_engine.protocol import Fingerprint, Region, Role
from kvasir_engine.scheduler.schedule import Limits
from kvasir_engine.transfer.agent import Agent, choose_fabric
from kvasir_engine.transfer.handoff import Handoff
from kvasir_engine.worker.engine import Engine
from kvasir_engine.worker.thread import EngineThread

log = logging.getLogger("worker")


@dataclass(frozen=True)
class EngineOptions:
    """What `kvasir worker` and `kvasir serve` have in common. `kv_cache_memory` in bytes, 0: from what is free."""

    model: str
    revision: str | None = None
    served_model_name: str = ""
    dtype: str = "auto"
    device: str = "auto"
    tensor_parallel: int = 1
    max_length: int = 0
    page_size: int = 16
    kv_cache_memory: int = 0
    max_running: int = 64
    prefill_chunk: int = 512
    fabric: str = "auto"


def build(options: EngineOptions, role: Role, moves_kv: bool) -> tuple[EngineThread, Fingerprint, Handoff | None]:
    """Load the model and start the threads. Raises ModelError for what the user can mend."""
    folder = resolve(options.model, options.revision, progress=log_progress("model"))
    runner = ModelRunner.load(
        folder,
        dtype=options.dtype,
        device=options.device,
        max_length=options.max_length,
        page_size=options.page_size,
        kv_cache_memory=options.kv_cache_memory,
        max_running=options.max_running,
        tensor_parallel=options.tensor_parallel,
        progress=log_progress("load"),
    )
    config, pool = runner.config, runner.pool
    fingerprint = Fingerprint(
        model=options.model,
        revision=options.revision or "",
        dtype=str(pool.tensor.dtype).removeprefix("torch."),
        layout="pages,layers,kv,heads,tokens,dim",
        page_size=options.page_size,
        layers=config.layers,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        positions=config.positions,
        tensor_parallel=options.tensor_parallel,
    )
    epoch = secrets.randbits(63)
    limits = Limits(options.prefill_chunk + options.max_running, options.max_running, options.page_size)
    thread: EngineThread
    handoff = None
    if moves_kv:
        choose_fabric(options.fabric)
        region = Region(pool.address, pool.pages, pool.page_bytes, "VRAM" if runner.device.type == "cuda" else "DRAM")

        def emit(event: object) -> None:
            thread.post(lambda engine: engine.transferred(event))  # type: ignore[arg-type]

        handoff = Handoff(lambda: Agent(epoch, region, fingerprint), emit)
    engine = Engine(runner, role, limits, runner.max_length, epoch, handoff)
    thread = EngineThread(engine)
    if handoff is not None:
        handoff.start()
    thread.start()
    log.info(
        "engine ready role=%s dtype=%s device=%s pages=%d page_bytes=%d tokens=%d max_length=%d",
        role,
        fingerprint.dtype,
        runner.device,
        pool.pages,
        pool.page_bytes,
        pool.pages * options.page_size,
        runner.max_length,
    )
    return thread, fingerprint, handoff


def log_progress(what: str) -> Callable[[str, int, int], None]:
    """A progress callback that logs a line a stage and each further tenth."""
    last: dict[str, int] = {}

    def progress(stage: str, done: int, total: int) -> None:
        tenth = 10 * done // total if total else 0
        if last.get(stage) != tenth:
            last[stage] = tenth
            log.info("%s stage=%s done=%d total=%d", what, stage, done, total)

    return progress
