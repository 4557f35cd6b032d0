"""Calls that begin alike: the first goes ahead, so that the others find its prefix in the server's cache."""

import asyncio


class PrefixGate:
    """For one event loop. The first to come leads; it has to `open` the gate however its call goes."""

    def __init__(self) -> None:
        self._led = False
        self._opened = asyncio.Event()

    async def enter(self) -> bool:
        """Whether the caller leads. Others return when the leader has had its first token, or has ended."""
        if not self._led:
            self._led = True
            return True
        await self._opened.wait()
        return False

    def open(self) -> None:
        """Let the others go on."""
        self._opened.set()
