"""What the controller needs of a cluster: `cluster.Cluster` implements it over HTTP, tests in memory."""

from collections.abc import Mapping
from typing import Any, Protocol

from kvasir_operator.plan.observed import Reference
from kvasir_operator.render.names import Object

# Who asks is not known for a moment, or it takes too long, or there is too much to do.
_BUSY = (401, 408, 429, 503, 504)


class ClusterError(Exception):
    """The API server refused a request, or did not answer. `status` is the HTTP status, 0 without an answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status

    @property
    def final(self) -> bool:
        """Whether the same request would be refused again, until something other than time changes."""
        return 400 <= self.status < 500 and self.status not in (401, 408, 409, 429)

    @property
    def refusal(self) -> bool:
        """Whether the API server refused the request, by any code, and is not only busy: users have to know."""
        return self.final or self._denied or self.status not in (0, *_BUSY)

    @property
    def stale(self) -> bool:
        """Whether the object has changed since it was read: it is read again, and no user has to know."""
        return self.status == 409 and not self._denied

    @property
    def _denied(self) -> bool:
        """Whether an admission webhook refused it, which chooses its code itself."""
        return "denied the request" in str(self)

    @property
    def terminating(self) -> bool:
        """Whether the namespace is being deleted, so that nothing can be created in it."""
        return self.status == 403 and "because it is being terminated" in str(self)


class ForeignObject(ClusterError):
    """An object of the wanted name exists and has another owner; it is left alone."""

    def __init__(self, target: Reference) -> None:
        super().__init__(0, f"{target} exists already and does not belong to this InferenceService")

    @property
    def final(self) -> bool:
        """Its owner has to remove it."""
        return True


class ClusterInterface(Protocol):
    """Reads and writes of one API server. All of them raise ClusterError."""

    def get_service(self, namespace: str, name: str) -> Object | None:
        """The InferenceService as it is stored, or `None`."""
        ...

    def owned(self, namespace: str, name: str, uid: str) -> list[Object]:
        """All objects that carry an InferenceService's labels and belong to the one with this uid."""
        ...

    def pods(self, namespace: str, name: str) -> list[Object]:
        """The pods of an InferenceService."""
        ...

    def foreign(self, item: Object) -> bool:
        """Whether an object of `item`'s name is there that `item`'s owner does not own."""
        ...

    def serves(self, api_version: str, kind: str) -> bool:
        """Whether the API server serves this kind."""
        ...

    def apply(self, item: Object) -> None:
        """Server-side apply `item`, taking over fields that others set.

        One with a resourceVersion that is not the stored one's is refused (ClusterError 409).
        """
        ...

    def scale(self, namespace: str, target: Reference, replicas: int, version: str) -> None:
        """Set an object's replicas, unless it has changed since `version` or is gone (ClusterError 409, 404)."""
        ...

    def report(self, namespace: str, target: Reference, replicas: int) -> None:
        """Set the replicas in an InferenceRole's status; nothing if it is gone."""
        ...

    def controller_uid(self, namespace: str, target: Reference, uid: str) -> str:
        """The uid of what controls an object that has this uid; "" where it is not there, or nothing does."""
        ...

    def put_secret(self, item: Object) -> None:
        """Have a Secret be `item`, whatever it was before. It is never read."""
        ...

    def lacks_secret(self, item: Object) -> bool:
        """Whether a Secret of `item`'s name is known not to be there. Nothing is written, and it is not read."""
        ...

    def delete(self, namespace: str, target: Reference, uid: str = "") -> None:
        """Delete an object; nothing if it is gone already, or (with a `uid`) another of its name."""
        ...

    def set_status(self, namespace: str, name: str, status: Mapping[str, Any], version: str = "") -> str:
        """Replace the status, if a `version` is given of that one only (ClusterError 409); the version it has then.

        Nothing if the InferenceService is gone.
        """
        ...

    def event(self, service: Object, warning: bool, reason: str, message: str, stamp: str, occasion: str) -> None:
        """Post an Event about an InferenceService at `stamp` (RFC 3339), once an `occasion`."""
        ...
