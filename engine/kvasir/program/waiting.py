"""asyncio's wait for what another thread does."""

import asyncio
import concurrent.futures
import contextlib
from typing import Any


async def until(future: "concurrent.futures.Future[Any]") -> None:
    """Return when it is done, however; who is cancelled meanwhile leaves it as it is."""
    loop = asyncio.get_running_loop()
    waiter = loop.create_future()

    def wake() -> None:
        if not waiter.done():
            waiter.set_result(None)

    def done(_: object) -> None:
        with contextlib.suppress(RuntimeError):  # nobody waits any more: the loop is closed
            loop.call_soon_threadsafe(wake)

    future.add_done_callback(done)
    await waiter
