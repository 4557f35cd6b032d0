"""The Secret with the authorities that sign pods' certificates, in the operator's own namespace: an edge.

It is read and written by its name alone. Whoever brings an authority of their own adds NAME.crt and NAME.key to it.
"""

import base64
import binascii
import json
from typing import Any

from kvasir_operator.certificates import Authority
from kvasir_operator.cluster.client import RequestTransport, object_path, status_message
from kvasir_operator.cluster.interface import ClusterError

_CERTIFICATE, _KEY = ".crt", ".key"


class AuthorityStore:
    """One Secret. Plain updates, not server-side apply: a write must fail when another writer was first."""

    def __init__(self, send: RequestTransport, namespace: str, name: str) -> None:
        self._send = send
        self._namespace = namespace
        self._name = name

    def read(self) -> tuple[list[Authority], str]:
        """All authorities, and the version that this is; none and "" where there is no Secret.

        Raises ClusterError.
        """
        status, answer = self._send("GET", self._path(self._name), {}, None, "application/json")
        if status == 404:
            return [], ""
        if status != 200:
            raise ClusterError(status, status_message(status, answer))
        item = json.loads(answer)
        return authorities(item), item["metadata"]["resourceVersion"]

    def write(self, found: list[Authority], version: str) -> bool:
        """Keep these; False when there are others than at `version`. Raises ClusterError."""
        metadata: dict[str, Any] = {"name": self._name, "namespace": self._namespace}
        data = {each.name + _CERTIFICATE: each.certificate for each in found}
        data |= {each.name + _KEY: each.key for each in found}
        body = {
            "apiVersion": "v1",
            "kind": "Secret",
            "type": "Opaque",
            "metadata": metadata,
            "data": {key: base64.b64encode(value).decode() for key, value in data.items()},
        }
        if version:
            metadata["resourceVersion"] = version
            status, answer = self._send("PUT", self._path(self._name), {}, body, "application/json")
        else:
            status, answer = self._send("POST", self._path(), {}, body, "application/json")
        if status in (404, 409):  # deleted, changed or created by somebody else: look again
            return False
        if status not in (200, 201):
            raise ClusterError(status, status_message(status, answer))
        return True

    def _path(self, name: str = "") -> str:
        return object_path("v1", "secrets", self._namespace, name)


def authorities(item: dict[str, Any]) -> list[Authority]:
    """The authorities of a Secret. Raises ClusterError for one that cannot be used: no guess signs anything."""
    data = item.get("data") or {}
    found = []
    for key, value in sorted(data.items()):
        name, ending = key.rpartition(".")[0], key[key.rfind(".") :]
        if ending == _KEY and name + _CERTIFICATE in data:
            continue
        if ending != _CERTIFICATE or name + _KEY not in data:
            raise _bad(item, f"{key} has no counterpart: an authority is NAME.crt and NAME.key")
        try:
            one = Authority(
                base64.b64decode(value, validate=True), base64.b64decode(data[name + _KEY], validate=True)
            )
            one.check()
        except (binascii.Error, ValueError, TypeError) as error:
            raise _bad(item, f"{name} is no authority: {error}") from None
        found.append(one)
    return found


def _bad(item: dict[str, Any], why: str) -> ClusterError:
    metadata = item["metadata"]
    return ClusterError(422, f"Secret {metadata['namespace']}/{metadata['name']}: {why}")
