"""The frame of a child process of `kvasir serve`: it starts with a channel, and ends with its parent."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable

from kvasir_engine.entrypoints.process_channel import ProcessChannel, ToChild
from kvasir_engine.errors import UserError
from kvasir_engine.logs import log_to_stderr
from kvasir_engine.model.loading.uri import ModelURIError


def run_child(prefix: str, descriptor: int, work: Callable[[ProcessChannel], Awaitable[None]]) -> None:
    """Run `work`, and exit: with 0 when it is done or the parent is gone, 2 for a user's error, else 1."""
    log_to_stderr(prefix=prefix)
    for number in (signal.SIGINT, signal.SIGTERM):  # what is said to the server is not for its parts to obey
        signal.signal(number, signal.SIG_IGN)
    status = 1
    try:
        asyncio.run(_over(descriptor, work))
        status = 0
    except EOFError:
        status = 0
    except (UserError, ModelURIError) as error:
        sys.stderr.write(f"kvasir: error: {error}\n")
        status = 2
    finally:
        if status == 1:
            sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(status)  # threads that wait for a process that has gone would be waited for


async def _over(descriptor: int, work: Callable[[ProcessChannel], Awaitable[None]]) -> None:
    await work(await ProcessChannel.over(socket.socket(fileno=descriptor), ToChild))


def gone() -> None:
    """End, because the parent is gone."""
    os._exit(0)
