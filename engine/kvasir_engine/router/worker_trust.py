"""Which workers a router believes, by their certificates."""

import ssl
from dataclasses import dataclass
from typing import Any

from kvasir_engine.tls import Credentials, Identity, Untrusted

WORKER_ROLES = ("prefill", "decode")


@dataclass(frozen=True)
class WorkerTrust:
    """`credentials` are the router's; None where there is no TLS. `plain`: take workers without TLS as well."""

    credentials: Credentials | None = None
    plain: bool = False

    def context(self, url: str) -> ssl.SSLContext | None:
        """For the next connection to `url`; None for one without TLS. Raises Untrusted for one that is not made."""
        if url.startswith("wss:"):
            if self.credentials is None:
                raise Untrusted("it wants TLS, and this router has no --tls-dir")
            return self.credentials.client
        if self.credentials is not None and not self.plain:
            raise Untrusted("it has no TLS, so nobody knows who it is (--plain-workers takes such ones)")
        return None

    def peer(self, tls: Any) -> Identity | None:
        """Who is at the other end of a connection; None without TLS. Raises Untrusted."""
        return None if self.credentials is None or tls is None else self.credentials.peer(tls, *WORKER_ROLES)


def check_claim(identity: Identity | None, role: str) -> None:
    """Raise Untrusted where a worker says that it has another role than its certificate."""
    if identity is not None and role not in ("both", identity.role):
        raise Untrusted(f"it says that it is {role}, and its certificate is of the role {identity.role}")
