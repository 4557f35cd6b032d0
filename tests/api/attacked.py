"""A process to be attacked: the API over a scripted engine, within limits that are given as JSON.

    python tests/api/attacked.py '{"header_seconds": 1}'

It prints its port, and what it logs goes to stderr. The engine answers "A" for as long as it is asked to.
"""

import asyncio
import json
import logging
import sys
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor

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


async def main() -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    limits = HttpLimits(**json.loads(sys.argv[1]))
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
        print(sock.getsockname()[1], flush=True)
        await serve(app, sock, GracefulShutdown(lifecycle, 60.0), limits=limits)


asyncio.run(main())
