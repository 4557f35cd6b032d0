"""Who a peer is: certificates of one InferenceService, by mutual TLS.

A folder holds `ca.crt` (one or several CAs), `tls.crt` and `tls.key`, as a Secret of type kubernetes.io/tls does.
The leaf's only URI SAN says who it is: `spiffe://kvasir/ns/NAMESPACE/inferenceservice/NAME/role/ROLE`. A peer is
believed whose certificate is signed by one of the CAs, is valid now, and names the same InferenceService. Host
names say nothing here: pods have addresses only.
"""

import contextlib
import hashlib
import logging
import re
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvasir_engine.errors import UserError

log = logging.getLogger("tls")

CA, CERTIFICATE, KEY = "ca.crt", "tls.crt", "tls.key"
LOOK_SECONDS = 5.0
"""Between two looks at the folder."""
HANDSHAKE_SECONDS = 10.0
_URI = re.compile(r"spiffe://kvasir/ns/([^/]+)/inferenceservice/([^/]+)/role/([^/]+)")


class CredentialError(UserError):
    """The folder's files are no credential; the message names the file, where that is known."""


class Untrusted(Exception):
    """A peer that is not believed, or may not do what it wants to; the message says why."""


@dataclass(frozen=True)
class Identity:
    """Who a certificate is of."""

    namespace: str
    name: str
    role: str

    @classmethod
    def of(cls, certificate: Mapping[str, Any] | None) -> "Identity":
        """That of a certificate as `ssl` shows it. Raises Untrusted."""
        names = (certificate or {}).get("subjectAltName", ())
        uris = [value for kind, value in names if kind == "URI"]
        if len(uris) != 1:
            raise Untrusted(f"its certificate has {len(uris)} URI SANs, not one")
        found = _URI.fullmatch(uris[0])
        if found is None:
            raise Untrusted(f"its certificate is of {uris[0]!r}, which is no role of an InferenceService")
        return cls(*found.groups())

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name} {self.role}"

    def check(self, peer: "Identity", roles: tuple[str, ...]) -> None:
        """Raise Untrusted unless the peer is of the same InferenceService, in one of these roles."""
        if (peer.namespace, peer.name) != (self.namespace, self.name):
            ours, theirs = f"{self.namespace}/{self.name}", f"{peer.namespace}/{peer.name}"
            raise Untrusted(f"it is of the InferenceService {theirs}, this is {ours}")
        if peer.role not in roles:
            raise Untrusted(f"its role is {peer.role}, only {' and '.join(roles)} may connect here")


@dataclass(frozen=True)
class _Loaded:
    digest: bytes
    server: ssl.SSLContext
    client: ssl.SSLContext
    identity: Identity


class Credentials:
    """This process's certificate and whom it believes, from the files in `folder`.

    The files are looked at again while they are used; a new whole set takes the old one's place for connections
    from then on. Raises CredentialError while there is no set that is right. May be used from any thread.
    """

    def __init__(self, folder: Path, clock: Any = time.monotonic) -> None:
        self._folder = folder
        self._clock = clock
        self._lock = threading.Lock()
        self._refused = b""
        self._loaded = self._load(self._read())
        self._looked = clock()
        log.info("credential identity=%s folder=%s", self._loaded.identity, folder)

    @property
    def identity(self) -> Identity:
        """Who this process is."""
        return self._current().identity

    @property
    def server(self) -> ssl.SSLContext:
        """For the next connection that is accepted."""
        return self._current().server

    @property
    def client(self) -> ssl.SSLContext:
        """For the next connection that is made."""
        return self._current().client

    def peer(self, tls: Any, *roles: str) -> Identity:
        """Who is at the other end of a connection (an SSLObject or SSLSocket). Raises Untrusted."""
        peer = Identity.of(None if tls is None else tls.getpeercert())
        self.identity.check(peer, roles)
        return peer

    def look(self) -> None:
        """Take the files if they have changed and are a whole set."""
        with self._lock:
            self._looked = self._clock()
            with contextlib.suppress(CredentialError):
                files = self._read(tell=True)
                digest = _digest(files)
                if digest in (self._loaded.digest, self._refused):
                    return
                try:
                    found = self._load(files)
                    if found.identity != self._loaded.identity:
                        raise CredentialError(f"it is of {found.identity}, this is {self._loaded.identity}")
                    self._loaded = found
                except CredentialError as error:
                    self._refused = digest
                    log.error("new credential refused, the old one stays reason=%r", str(error))
                    return
                self._refused = b""
                log.info("credential renewed identity=%s", self._loaded.identity)

    def _current(self) -> _Loaded:
        if self._clock() - self._looked >= LOOK_SECONDS:
            self.look()
        return self._loaded

    def _read(self, tell: bool = False) -> dict[str, bytes]:
        try:
            return {name: (self._folder / name).read_bytes() for name in (CA, CERTIFICATE, KEY)}
        except OSError as error:
            if tell:
                log.error("credential cannot be read, the old one stays reason=%r", str(error))
            raise CredentialError(f"tls-dir {self._folder}: {error}") from error

    def _load(self, files: dict[str, bytes]) -> _Loaded:
        try:
            server, client = (
                self._context(kind, files) for kind in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT)
            )
            identity = Identity.of(_own_certificate(server, client))
        except (ssl.SSLError, ValueError, OSError) as error:
            raise CredentialError(f"tls-dir {self._folder}: {_reason(error)}") from error
        except Untrusted as error:
            raise CredentialError(f"tls-dir {self._folder}: {CERTIFICATE}: {error}") from error
        return _Loaded(_digest(files), server, client, identity)

    def _context(self, kind: Any, files: dict[str, bytes]) -> ssl.SSLContext:
        context = ssl.SSLContext(kind)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        if kind == ssl.PROTOCOL_TLS_SERVER:
            # Who comes back with a ticket shows no certificate, and so none that has ended since.
            context.num_tickets = 0
        try:
            context.load_verify_locations(cadata=files[CA].decode())
        except (ssl.SSLError, ValueError) as error:
            raise CredentialError(f"tls-dir {self._folder}: {CA}: {_reason(error)}") from error
        try:
            # By path, as `ssl` has no other way; what changed between two reads is no pair, or is looked at again.
            context.load_cert_chain(self._folder / CERTIFICATE, self._folder / KEY, _no_password)
        except (ssl.SSLError, ValueError, OSError) as error:
            raise CredentialError(f"tls-dir {self._folder}: {CERTIFICATE}, {KEY}: {_reason(error)}") from error
        return context


def credentials_of(folder: str) -> Credentials | None:
    """Those in a folder; none where no folder is said. Raises CredentialError."""
    return Credentials(Path(folder)) if folder else None


def check_role(credentials: Credentials, role: str) -> None:
    """Raise CredentialError where the certificate is of another role than this process has."""
    identity = credentials.identity
    if role not in ("both", identity.role):
        raise CredentialError(f"tls-dir: the certificate is of the role {identity.role}, this is {role}")


def _no_password() -> str:
    """Of an encrypted key. Without this OpenSSL asks the terminal, and waits."""
    raise ValueError("the key is encrypted")


def _digest(files: Mapping[str, bytes]) -> bytes:
    return hashlib.sha256(b"\0".join(hashlib.sha256(files[name]).digest() for name in sorted(files))).digest()


def _own_certificate(server: ssl.SSLContext, client: ssl.SSLContext) -> Mapping[str, Any] | None:
    """The certificate of a set of files, as a peer with the same CAs gets it. Raises ssl.SSLError."""
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    asks = client.wrap_bio(back, there, server_side=False)
    answers = server.wrap_bio(there, back, server_side=True)
    for _ in range(4):
        for side in (asks, answers):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
    return answers.getpeercert()


def _reason(error: Exception) -> str:
    """An error of `ssl` in its own words, without numbers of lines in C."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate verify failed: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return str(error.reason or error).replace("_", " ").lower()
    return str(error)


def why_failed(error: BaseException) -> str:
    """Why a handshake has failed, in a few words for the log."""
    if isinstance(error, ssl.SSLError | OSError):
        return _reason(error) or type(error).__name__
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
