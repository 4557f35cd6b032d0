"""Calls with a common prefix: the first goes ahead, so that the others find the prefix in the server's cache."""

import asyncio


class PrefixGate:
    """For one event loop. The first caller leads, and has to `open` the gate whether its call succeeds or not."""

    def __init__(self) -> None:
        self._led = False
        self._opened = asyncio.Event()

    async def enter(self) -> bool:
        """True at once for the leader. False for others, once the leader has its first token or has ended."""
        if not self._led:
            self._led = True
            return True
        await self._opened.wait()
        return False

    def open(self) -> None:
        """Let the other callers continue."""
        self._opened.set()
