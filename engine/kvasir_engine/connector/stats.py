"""What a transfer thread counts."""

from dataclasses import dataclass, fields


@dataclass
class TransferStats:
    """Counters since the start; read by the metrics collector from another thread. Times in seconds."""

    writes: int = 0
    descriptors: int = 0
    write_seconds: float = 0.0
    digests: int = 0
    digest_seconds: float = 0.0
    digest_failures: int = 0
    peers_died: int = 0
    handoffs: int = 0
    exposed_seconds: float = 0.0
    sent_bytes: int = 0
    received_bytes: int = 0
    read_bytes: int = 0
    read_seconds: float = 0.0

    @property
    def read_rate(self) -> float:
        """Bytes a second of a rank's reads, from posting to knowing that they are right; 0 before the first."""
        return self.read_bytes / self.read_seconds if self.read_seconds else 0.0

    def __add__(self, other: "TransferStats") -> "TransferStats":
        """The counters of two ranks, added up."""
        names = [each.name for each in fields(self)]
        return TransferStats(**{name: getattr(self, name) + getattr(other, name) for name in names})
