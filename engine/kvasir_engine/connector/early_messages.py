"""Messages of peers about leases that rank 0 has granted, and that another rank has not heard of yet: pure.

Rank 0 counts leases and loans up, and its grants come to the other ranks over a network: a writer may be faster.
"""

MOST_EARLY = 1024


class EarlyMessages:
    """What a rank keeps until it hears of the lease."""

    def __init__(self) -> None:
        self._granted = 0  # the latest lease or loan
        self._messages: list[tuple[int, str, bytes]] = []

    def grant(self, lease: int) -> None:
        """This lease or loan was granted, and all that have lower numbers."""
        self._granted = lease

    def is_early(self, lease: int) -> bool:
        """Whether a lease may still be granted."""
        return lease > self._granted

    def keep(self, lease: int, agent: str, data: bytes) -> bool:
        """Keep what `agent` says of `lease`. Whether there was room."""
        if len(self._messages) >= MOST_EARLY:
            return False
        self._messages.append((lease, agent, data))
        return True

    def granted(self) -> list[tuple[str, bytes]]:
        """The messages whose leases are granted now, with their agents, each once."""
        due = [(agent, data) for lease, agent, data in self._messages if lease <= self._granted]
        self._messages = [each for each in self._messages if each[0] > self._granted]
        return due
