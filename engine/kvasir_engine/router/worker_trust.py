"""Decides by certificate which workers a router trusts."""

import ssl
from dataclasses import dataclass
from typing import Any

from kvasir_engine.tls import Credentials, Identity, Untrusted

WORKER_ROLES = ("prefill", "decode")


@dataclass(frozen=True)
class WorkerTrust:
    """`credentials` are the router's; None without TLS. `plain`: accept workers without TLS too."""

    credentials: Credentials | None = None
    plain: bool = False

    def context(self, url: str) -> ssl.SSLContext | None:
        """The TLS context for the next connection to `url`; None for one without TLS. Raises Untrusted when it may
        not be made.
        """
        if url.startswith("wss:"):
            if self.credentials is None:
                raise Untrusted("it wants TLS, and this router has no --tls-dir")
            return self.credentials.client
        if self.credentials is not None and not self.plain:
            raise Untrusted("it has no TLS, so nobody knows who it is (--plain-workers takes such ones)")
        return None

    def peer(self, tls: Any) -> Identity | None:
        """The identity at the other end of a connection; None without TLS. Raises Untrusted."""
        return None if self.credentials is None or tls is None else self.credentials.peer(tls, *WORKER_ROLES)


def check_claim(identity: Identity | None, role: str) -> None:
    """Raise Untrusted when a worker claims another role than its certificate's."""
    if identity is not None and role not in ("both", identity.role):
        raise Untrusted(f"it says that it is {role}, and its certificate is of the role {identity.role}")
