"""The engine process of a `kvasir serve` with API processes.

Started as `python -m kvasir_engine.entrypoints.engine_process CHANNEL`; CHANNEL is a descriptor. It serves the API
processes as a worker serves routers, over a Unix socket.
"""

import asyncio
import logging
import os
import socket
import sys
from pathlib import Path

from prometheus_client import CollectorRegistry

from kvasir_engine.api.http.graceful_shutdown import GracefulShutdown
from kvasir_engine.api.http.server import BACKLOG, serve_until
from kvasir_engine.api.joint_metrics import shown_at
from kvasir_engine.config import EngineConfig
from kvasir_engine.core.engine_thread import EngineThread
from kvasir_engine.core.metrics import EngineCollector
from kvasir_engine.entrypoints.build import build
from kvasir_engine.entrypoints.child_process import gone, run_child
from kvasir_engine.entrypoints.process_channel import (
    EndProcess,
    EngineSetup,
    EngineUnhealthy,
    ProcessChannel,
    ProcessReady,
)
from kvasir_engine.entrypoints.worker_server import WorkerServer, hello_of
from kvasir_engine.executor.fingerprint import fingerprint_of
from kvasir_engine.executor.rank_process import region_of
from kvasir_engine.model.loading.resolver import resolve
from kvasir_engine.protocol import Endpoint
from kvasir_engine.supervisor import Supervisor, end_process

log = logging.getLogger("worker")

HEALTH_SECONDS = 1.0
LEAVE_SECONDS = 5.0


async def run(channel: ProcessChannel) -> None:
    """Load, and serve until told to end."""
    setup = await channel.receive()
    assert isinstance(setup, EngineSetup)
    tasks, leave = Supervisor(end_process), asyncio.Event()
    hearing = tasks.start(_hear(channel, leave), "the channel to the server")
    try:
        await _serve(setup, channel, tasks, leave)
    finally:
        await tasks.stop(hearing)


async def _serve(setup: EngineSetup, channel: ProcessChannel, tasks: Supervisor, leave: asyncio.Event) -> None:
    thread, _ = await asyncio.to_thread(build, setup.config, False, ended=end_process)
    registry = CollectorRegistry()
    registry.register(EngineCollector(thread.engine))
    server = WorkerServer(thread, hello_of(setup.config, thread, _endpoint(setup.config, thread)))
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(setup.path)
            os.chmod(setup.path, 0o600)
            sock.listen(BACKLOG)
            async with shown_at(Path(setup.metrics), registry):
                running = tasks.start(_watch(thread, channel), "watch of the engine's thread")
                channel.send(ProcessReady())
                await serve_until(server.app, sock, GracefulShutdown(server, LEAVE_SECONDS), [leave])
                await tasks.stop(running)
    finally:
        thread.stop()
        thread.engine.runner.close()


def _endpoint(config: EngineConfig, thread: EngineThread) -> Endpoint:
    """The endpoint, without a NIXL agent: no other worker connects to this engine."""
    engine = thread.engine
    folder = resolve(config.model, config.revision or None)
    fingerprint = fingerprint_of(config, folder, engine.runner.config, engine.runner.dtype)
    return Endpoint("local", engine.epoch, b"", region_of(engine.runner), fingerprint)


async def _hear(channel: ProcessChannel, leave: asyncio.Event) -> None:
    while True:
        try:
            if isinstance(await channel.receive(), EndProcess):
                leave.set()
        except EOFError:
            gone()


async def _watch(thread: EngineThread, channel: ProcessChannel) -> None:
    last_reason = ""
    while True:
        reason = thread.unhealthy_reason() or ""
        if reason != last_reason:
            channel.send(EngineUnhealthy(reason))
            last_reason = reason
        await asyncio.sleep(HEALTH_SECONDS)


if __name__ == "__main__":
    run_child("engine.", int(sys.argv[1]), run)
