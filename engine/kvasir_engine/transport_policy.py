"""Which peers KV may go to, by what carries it. Pure, but for `place_here`.

No transport of NIXL encrypts (UCX has none that does), and over TCP nothing checks keys either: whoever reaches the
port of a process can write to any of its memory (docs/security.md). So `required` leaves what does not leave the
machine: shared memory, with UCX's TCP, which carries messages, on loopback.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from kvasir_engine.protocol import Encryption

ENCRYPTED_FABRICS = ("auto", "shm")
"""Those that `required` takes; `auto` is shm then."""


@dataclass(frozen=True)
class TransportPolicy:
    """What a worker asks of the transport of its KV, and where it is (`place_here`)."""

    encryption: Encryption = "auto"
    place: str = ""

    def refusal(self, peer: "TransportPolicy") -> str | None:
        """Why KV may not go from one to the other; None if it may."""
        if "required" not in (self.encryption, peer.encryption) or (self.place and self.place == peer.place):
            return None
        return "encryption is required, and NIXL between two machines or pods is not encrypted"


ANY_TRANSPORT = TransportPolicy()


def place_here() -> str:
    """A name that is the same for processes that share a machine and its loopback, and for no others."""
    machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    network = os.stat("/proc/self/ns/net")
    identity = f"{machine}/{network.st_dev}/{network.st_ino}"
    return hashlib.sha256(identity.encode()).hexdigest()[:32]
