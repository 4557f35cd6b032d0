"""A process to be attacked: the API over a scripted engine, which answers "A" for as long as it is asked to."""

import asyncio
import logging
import os
import resource
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

from api_support import ScriptedEngine, saying, tiny_model
from prometheus_client import CollectorRegistry

from kvasir_engine.api.app import create_app
from kvasir_engine.api.http.graceful_shutdown import GracefulShutdown
from kvasir_engine.api.http.limits import HttpLimits
from kvasir_engine.api.http.server import listen, serve
from kvasir_engine.api.lifecycle import Lifecycle
from kvasir_engine.engine_client import GenerateRequest, Output


async def one_at_a_time(request: GenerateRequest) -> AsyncGenerator[Output, None]:
    """As an engine gives tokens: between two of them others have their turn."""
    async for output in saying([65] * 2_000_000)(request):
        yield output
        await asyncio.sleep(0)


def serve_within(limits: dict[str, float], files: int, log: str, port: Connection) -> None:
    """Send the port to `port` and serve, with so many files at most, if any; what is logged goes to `log`."""
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 2)
    if files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    logging.basicConfig(level=logging.INFO)
    asyncio.run(_serve(HttpLimits(**limits), port))  # type: ignore[arg-type]


async def _serve(limits: HttpLimits, port: Connection) -> None:
    engine = ScriptedEngine(one_at_a_time, max_length=2**22)
    lifecycle = Lifecycle()
    with ThreadPoolExecutor(1) as executor:
        app = create_app(
            engine,
            tiny_model(),
            registry=CollectorRegistry(),
            lifecycle=lifecycle,
            executor=executor,
            body_bytes=limits.body_bytes,
        )
        sock = listen("127.0.0.1", 0)
        port.send(sock.getsockname()[1])
        port.close()
        await serve(app, sock, GracefulShutdown(lifecycle, 60.0), limits=limits)
