"""Leases of other workers that their holder has not confirmed yet: pure.

A lease comes by way of a router. Before the first byte is written under it the writer asks the holder, directly,
whether it granted a lease with this number and nonce; so nobody who only knows the holder's address, and no router
that errs, has pages overwritten. The prompt is computed meanwhile.
"""

from dataclasses import dataclass, field

from kvasir_engine.connector.notifications import Ping
from kvasir_engine.connector.sender import PING_INTERVAL, Key, Push


@dataclass
class _Unconfirmed:
    """A part whose holder has not answered; `pinged` is when it was last asked, in seconds."""

    ping: Ping
    pinged: float = float("-inf")
    waiting: list[Push] = field(default_factory=list)


class UnconfirmedLeases:
    """The parts that wait for the holder's `Pong`, and what is to be pushed under them."""

    def __init__(self) -> None:
        self._parts: dict[Key, _Unconfirmed] = {}

    def open(self, part: Key, ping: Ping) -> None:
        """Begin to ask the holder."""
        self._parts[part] = _Unconfirmed(ping)

    def due(self, now: float) -> list[tuple[str, Ping]]:
        """The holders to ask now, with what: each at once, and again until it answers or is found dead."""
        due = [(key, each) for key, each in self._parts.items() if now >= each.pinged + PING_INTERVAL]
        for _, each in due:
            each.pinged = now
        return [(agent, each.ping) for (agent, _), each in due]

    def waits(self, part: Key, push: Push) -> bool:
        """Whether `push` has to wait; `confirm` returns it then."""
        found = self._parts.get(part)
        if found is not None:
            found.waiting.append(push)
        return found is not None

    def confirm(self, part: Key) -> list[Push]:
        """The holder knows the lease. Returns what waited, in order; of a part that did not wait, nothing."""
        found = self._parts.pop(part, None)
        return [] if found is None else found.waiting

    def close(self, part: Key) -> None:
        """Forget a part that has ended. Idempotent."""
        self._parts.pop(part, None)
