"""An API process of `kvasir serve`: the router's front end over the server's one engine.

Started as `python -m kvasir_engine.entrypoints.api_process NUMBER CHANNEL SOCKET`; the last two are descriptors.
SOCKET is bound to the server's port; the kernel distributes connections among all API processes.
"""

import asyncio
import logging
import socket
import sys
from functools import partial
from pathlib import Path

from kvasir_engine.entrypoints.torchless import without_torch

without_torch()

from prometheus_client import CollectorRegistry  # noqa: E402

from kvasir_engine.api.http.graceful_shutdown import GracefulShutdown  # noqa: E402
from kvasir_engine.api.http.server import serve_until  # noqa: E402
from kvasir_engine.api.joint_metrics import gathered, shown_at  # noqa: E402
from kvasir_engine.api.lifecycle import Lifecycle  # noqa: E402
from kvasir_engine.entrypoints.child_process import gone, run_child  # noqa: E402
from kvasir_engine.entrypoints.front_end import api_files, front_end, served_model  # noqa: E402
from kvasir_engine.entrypoints.process_channel import (  # noqa: E402
    AcceptRequests,
    ApiSetup,
    BecomeUnready,
    EndProcess,
    EngineUnhealthy,
    Inflight,
    ProcessChannel,
    ProcessReady,
)
from kvasir_engine.router.client import PooledClient  # noqa: E402
from kvasir_engine.router.connection import UNIX  # noqa: E402
from kvasir_engine.router.pool import WorkerPool  # noqa: E402
from kvasir_engine.supervisor import Supervisor, end_process  # noqa: E402

log = logging.getLogger("api")


class LocalEngine(PooledClient):
    """The one engine as a pool of one worker. `ill`: why it cannot serve, as its process reports."""

    ill = ""

    def unready_reason(self) -> str | None:
        """See EngineClient."""
        return self.ill or super().unready_reason()

    async def wait_ready(self) -> str | None:
        """See EngineClient; does not wait for an unhealthy engine."""
        return self.ill or await super().wait_ready()


async def run(channel: ProcessChannel, sock: socket.socket) -> None:
    """Load, and serve until told to end."""
    setup = await channel.receive()
    assert isinstance(setup, ApiSetup)
    options, config = setup.options, setup.options.config
    tasks, registry = Supervisor(end_process), CollectorRegistry()
    lifecycle = Lifecycle(lambda inflight: channel.send(Inflight(inflight)))
    shutdown = GracefulShutdown(lifecycle, config.drain_seconds)
    opened, leave = asyncio.Event(), asyncio.Event()
    pool = WorkerPool(options.name, tasks)
    # What a router measures of its workers says nothing of one that is the server's own.
    client = LocalEngine(pool, registry=CollectorRegistry(), remote_threshold=0)
    hearing = tasks.start(_hear(channel, client, shutdown, opened, leave), "the channel to the server")
    try:
        files = api_files(options, lifecycle)
        model = await served_model(options, config.model, config.revision)
        pool.set_workers({UNIX + setup.engine: "engine"})
        while pool.unready_reason() is not None:
            await pool.change()
        all_metrics = partial(gathered, registry, [Path(each) for each in setup.others])
        async with (
            front_end(client, model, files, tasks, registry, all_metrics=all_metrics) as front,
            shown_at(Path(setup.metrics), registry),
        ):
            channel.send(ProcessReady())
            await opened.wait()
            async with front.running_batches():
                await serve_until(front.app, sock, shutdown, [leave])
    finally:
        await client.close()
        await pool.close()
        await tasks.stop(hearing)


async def _hear(
    channel: ProcessChannel,
    client: LocalEngine,
    shutdown: GracefulShutdown,
    opened: asyncio.Event,
    leave: asyncio.Event,
) -> None:
    while True:
        try:
            message = await channel.receive()
        except EOFError:
            gone()
        match message:
            case AcceptRequests():
                opened.set()
            case EngineUnhealthy(reason):
                client.ill = reason
            case BecomeUnready():
                shutdown.begin()
            case EndProcess():
                shutdown.stop_waiting()
                leave.set()


def main() -> None:
    """Entry point."""
    number, channel, port = sys.argv[1:]
    run_child(f"api{number}.", int(channel), partial(run, sock=socket.socket(fileno=int(port))))


if __name__ == "__main__":
    main()
