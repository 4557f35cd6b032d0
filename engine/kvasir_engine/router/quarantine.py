"""Pairs of workers that transferred a wrong page: they get no request until a canary passes.

Digests are compared before anything is decoded from a page, so the request continues on other workers. But the path
between the two may be broken: a device, a driver, a stale mapping. So a short prompt that is in no radix tree is
sent along it from time to time; once its KV arrives intact, the pair gets requests again.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

from kvasir_engine.router.attempt import Target
from kvasir_engine.supervisor import Supervisor

log = logging.getLogger("router")

MISMATCH = "kv_digest_mismatch"
CANARY_SECONDS = 2.0

Pair = tuple[str, str]  # NIXL agents of the writer and the holder: a restarted worker is another agent
Canary = Callable[[Target, Target], Awaitable[bool]]


class Quarantine:
    """The quarantined pairs. `canary` sends a prompt from a prefill to a decode target; its result says whether all
    of it arrived intact.
    """

    def __init__(self, canary: Canary, interval: float = CANARY_SECONDS) -> None:
        self._canary = canary
        self._interval = interval
        self._tasks = Supervisor()
        self._probes: dict[Pair, asyncio.Task[None]] = {}

    def __len__(self) -> int:
        return len(self._probes)

    def refuses(self, writer: str, holder: str) -> bool:
        """Whether the pair is quarantined: no request may move KV from agent `writer` to agent `holder`."""
        return (writer, holder) in self._probes

    def suspect(self, prefill: Target, decode: Target) -> None:
        """Quarantine the pair: a page between the two was wrong."""
        pair = prefill.peer.endpoint.agent, decode.peer.endpoint.agent
        if pair not in self._probes:
            log.error("pair quarantined prefill=%s decode=%s", prefill.worker.name, decode.worker.name)
            probe = self._probe(pair, prefill, decode)
            name = f"canary from {prefill.worker.name} to {decode.worker.name}"
            # A pair is released by its end, however it ended; the next page that comes wrong brings it back.
            self._probes[pair] = self._tasks.start(probe, name, lambda _: None)

    async def close(self) -> None:
        """Stop probing."""
        await self._tasks.stop(*self._probes.values())

    async def _probe(self, pair: Pair, prefill: Target, decode: Target) -> None:
        try:
            while True:
                await asyncio.sleep(self._interval * random.uniform(0.8, 1.2))
                if not (prefill.available() and decode.available()):
                    break  # gone, and whoever comes back is another agent
                if await self._canary(prefill, decode):
                    log.info("pair released prefill=%s decode=%s", prefill.worker.name, decode.worker.name)
                    break
            self._tasks.forget(asyncio.current_task())
        finally:
            self._probes.pop(pair, None)
