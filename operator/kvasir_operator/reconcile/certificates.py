"""The certificates of a service's pods: made when they are due, and put into the Secrets that its pods mount.

What was issued last stands in the service's status, as the operator reads no Secret outside of its own namespace.
"""

import base64
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from datetime import datetime
from typing import Any, Protocol

import msgspec

from kvasir_operator.certificates import (
    Authority,
    IssuedCertificates,
    due,
    files,
    identity,
    new_authority,
    new_leaf,
    overdue,
)
from kvasir_operator.cluster.interface import ClusterError, ClusterInterface
from kvasir_operator.plan.observed import Reference
from kvasir_operator.render.names import (
    CERTIFICATES,
    ROLES,
    Object,
    OwningService,
    Role,
    labels,
    metadata,
    tls_secret_name,
)
from kvasir_operator.status.evaluate import ConditionState, certificates_ready, no_certificates

log = logging.getLogger("kvasir.certificates")

# How long what was read of the authorities is believed.
AUTHORITY_SECONDS = 60.0
_TRIES = 3


class Authorities(Protocol):
    """Where the authorities are. Both raise ClusterError."""

    def read(self) -> tuple[list[Authority], str]:
        """All of them, and the version that this is."""
        ...

    def write(self, found: list[Authority], version: str) -> bool:
        """Keep these; False when there are others than at `version`."""
        ...


class CertificateResult(msgspec.Struct, frozen=True):
    """What is issued now, and the condition. `renewed`: the message of an Event, if one is due."""

    issued: IssuedCertificates | None
    condition: ConditionState
    renewed: str = ""
    refused: tuple[Reference, ClusterError] | None = None


class CertificateManager:
    """Issues the certificates of all services. For use in threads.

    `now` is the time of certificates, `clock` that of what was read.
    """

    def __init__(
        self,
        cluster: ClusterInterface,
        store: Authorities,
        now: Callable[[], datetime],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster = cluster
        self._store = store
        self._now = now
        self._clock = clock
        self._lock = threading.Lock()
        self._known: list[Authority] = []
        self._read_at = 0.0

    def issue(self, document: Mapping[str, Any], waiting: Collection[Role] = ()) -> CertificateResult:
        """Issue what is due. `waiting`: roles with pods that are not ready, which may miss their Secret.

        Raises ClusterError without an answer.
        """
        before, now = issued_before(document), self._now()
        annotations = document["metadata"].get("annotations") or {}
        try:
            authorities = self._authorities(now)
        except ClusterError as error:
            if not error.refusal:
                raise
            return CertificateResult(
                before, no_certificates("NoAuthority", f"no authority can be read or kept: {error}")
            )
        owner = OwningService.of(document)
        asked = _digest(str(annotations.get(CERTIFICATES, "")))
        found = due(before, authorities, now, asked)
        if found is None and any(self._cluster.lacks_secret(_secret(owner, role, {})) for role in waiting):
            found = due(before, authorities, now, asked, lost=True)
        if found is None:
            assert before is not None
            return CertificateResult(before, certificates_ready(before.signed_by, before.expires_at))
        issued, signer, trusted = found
        for role in ROLES:
            leaf = new_leaf(signer, identity(owner.namespace, owner.name, role), now)
            item = _secret(owner, role, files(leaf, trusted))
            try:
                self._cluster.put_secret(item)
            except ClusterError as error:
                if not error.refusal:
                    raise
                target = Reference("v1", "Secret", item["metadata"]["name"])
                condition = no_certificates("Refused", f"{target}: {error}")
                return CertificateResult(before, condition, refused=(target, error))
        log.info("issue service=%s/%s authority=%s", owner.namespace, owner.name, signer.name)
        renewed = f"signed by authority {issued.signed_by}, valid until {issued.expires_at}" if before else ""
        return CertificateResult(issued, certificates_ready(issued.signed_by, issued.expires_at), renewed)

    def _authorities(self, now: datetime) -> list[Authority]:
        """The authorities that have not expired; where none has long to go, a new one with them."""
        with self._lock:
            if not self._known or self._clock() - self._read_at >= AUTHORITY_SECONDS:
                self._known = self._read(now)
                self._read_at = self._clock()
            return self._known

    def _read(self, now: datetime) -> list[Authority]:
        for _ in range(_TRIES):
            found, version = self._store.read()
            alive = [each for each in found if each.ends > now]
            if not overdue(alive, now):
                return alive
            alive.append(new_authority(now))
            if self._store.write(alive, version):
                log.info("new authority name=%s", alive[-1].name)
                return alive
        raise ClusterError(409, "the Secret of authorities changes whenever it is written")


def issued_before(document: Mapping[str, Any]) -> IssuedCertificates | None:
    """The certificates in the status; `None` where there are none, or they cannot be read."""
    try:
        return msgspec.convert(document.get("status", {}).get("certificates"), IssuedCertificates)
    except msgspec.ValidationError:
        return None


def _digest(text: str) -> str:
    """A short digest for the status of a text that a user wrote, which may have any length."""
    return hashlib.sha256(text.encode()).hexdigest()[:16] if text else ""


def _secret(owner: OwningService, role: Role, data: Mapping[str, bytes]) -> Object:
    encoded = {key: base64.b64encode(value).decode() for key, value in data.items()}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "kubernetes.io/tls",
        "metadata": metadata(owner, tls_secret_name(owner, role), labels(owner, role)),
        "data": {"tls.crt": "", "tls.key": "", **encoded},
    }
