"""Waits in asyncio for futures of other threads."""

import asyncio
import concurrent.futures
import contextlib
from typing import Any


async def wait_done(future: "concurrent.futures.Future[Any]") -> None:
    """Return when `future` is done, failed or cancelled. Cancelling the waiter does not cancel the future."""
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
