"""The leases and loans of other workers that one rank writes or reads under, by their parts: pure.

The engine names a lease by its holder's rank 0; a part is named by the holder's rank that it is with.
"""

from dataclasses import dataclass, field

from kvasir_engine.connector.sender import Key


@dataclass
class _LeaseParts:
    parts: list[Key] = field(default_factory=list)
    computed: float = 0.0  # when the prompt's last layer was


class OpenLeases:
    """The parts of each lease."""

    def __init__(self) -> None:
        self._leases: dict[Key, _LeaseParts] = {}
        self._lease_of: dict[Key, Key] = {}

    def open(self, key: Key, parts: list[Key]) -> None:
        """The lease `key` has these parts; on a rank that has none of it there is nothing to end."""
        if parts:
            self._leases.setdefault(key, _LeaseParts()).parts += parts
            self._lease_of |= dict.fromkeys(parts, key)

    def parts(self, key: Key) -> list[Key]:
        """Those that have not ended; of a lease that is not known, none."""
        return list(self._leases[key].parts) if key in self._leases else []

    def computed(self, key: Key, moment: float) -> None:
        """The last layer of the lease's prompt was computed at `moment`."""
        if key in self._leases:
            self._leases[key].computed = moment

    def computed_at(self, part: Key) -> float:
        """When the last layer of the prompt of the lease of `part`, which is open, was computed."""
        return self._leases[self._lease_of[part]].computed

    def close(self, part: Key) -> None:
        """A part has ended. Idempotent."""
        key = self._lease_of.pop(part, None)
        if key is not None:
            self._leases[key].parts.remove(part)
            if not self._leases[key].parts:
                del self._leases[key]
