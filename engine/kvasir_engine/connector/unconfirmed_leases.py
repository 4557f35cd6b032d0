"""Leases of other workers that their holder has not confirmed yet: pure.

A lease comes by way of a router. Before the first byte is written under it the writer asks the holder, directly,
whether it granted a lease with this number and nonce; so nobody who only knows the holder's address, and no router
that errs, has pages overwritten. The prompt is computed meanwhile.
"""

from dataclasses import dataclass, field

from kvasir_engine.connector.notifications import Ping
from kvasir_engine.connector.sender import PING_INTERVAL, Key, Push


@dataclass
class _Asked:
    ping: Ping
    asked: float = float("-inf")
    waiting: list[Push] = field(default_factory=list)


class UnconfirmedLeases:
    """The parts that wait for the holder's `Pong`, and what is to be pushed under them."""

    def __init__(self) -> None:
        self._parts: dict[Key, _Asked] = {}

    def open(self, part: Key, ping: Ping) -> None:
        """Begin to ask the holder."""
        self._parts[part] = _Asked(ping)

    def due(self, now: float) -> list[tuple[str, Ping]]:
        """The holders to ask now, with what: each at once, and again until it answers or is found dead."""
        asked = [(key, each) for key, each in self._parts.items() if now >= each.asked + PING_INTERVAL]
        for _, each in asked:
            each.asked = now
        return [(agent, each.ping) for (agent, _), each in asked]

    def waits(self, part: Key, push: Push) -> bool:
        """Whether `push` has to wait; `confirm` returns it then."""
        asked = self._parts.get(part)
        if asked is not None:
            asked.waiting.append(push)
        return asked is not None

    def confirm(self, part: Key) -> list[Push]:
        """The holder knows the lease. Returns what waited, in order; of a part that did not wait, nothing."""
        asked = self._parts.pop(part, None)
        return [] if asked is None else asked.waiting

    def close(self, part: Key) -> None:
        """Forget a part that has ended. Idempotent."""
        self._parts.pop(part, None)
