"""Writes the status and the Events of InferenceServices."""

import logging
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import msgspec

from kvasir_operator.api import SET_KIND
from kvasir_operator.cluster.interface import ClusterError, ClusterInterface
from kvasir_operator.plan import Delete, Step
from kvasir_operator.plan.release import ServiceRelease
from kvasir_operator.render import Object
from kvasir_operator.status import derive as statuses
from kvasir_operator.status.events import StatusEvent, status_events

log = logging.getLogger("kvasir.reconcile")


class StatusWriter:
    """Writes what `operator` (the name that stands in the status; "" for none) reports of services.

    `document` is an InferenceService as it was read. Where a method writes the status before other objects change,
    it puts that status and its resourceVersion into `document`.
    """

    def __init__(self, cluster: ClusterInterface, operator: str, now: Callable[[], datetime]) -> None:
        self._cluster = cluster
        self._operator = operator
        self._now = now

    def claim(self, document: Object) -> None:
        """Record this operator in the status before any object is changed. Of two operators that try, one is
        refused."""
        previous = document.get("status", {})
        if self._operator and previous.get("operator") != self._operator:
            document["status"] = {**previous, "operator": self._operator}
            self.write(document, document["status"], guarded=True)

    def record_removing(self, document: Object, steps: Sequence[Step]) -> None:
        """Write to the status which sets are to be deleted, before any is deleted.

        The write is refused where the status has changed since it was read. Otherwise two operators that choose at
        the same time could delete two sets where the plan can spare one.
        """
        going = sorted(s.target.name for s in steps if isinstance(s, Delete) and s.target.kind == SET_KIND)
        previous = document.get("status", {})
        if not set(going) <= set(previous.get("removing", [])):
            document["status"] = {**previous, "removing": going}
            self.write(document, document["status"], guarded=True)

    def warn(self, document: Object, reason: str, message: str, occasion: str) -> None:
        """Post a warning; of one reason and one `occasion` it is posted once."""
        self.post(document, StatusEvent(True, reason, message, self.timestamp(), occasion))

    def post(self, document: Object, event: StatusEvent) -> None:
        """Post an Event. Where the API server refuses Events, the reconcile goes on."""
        try:
            self._cluster.event(document, event.warning, event.reason, event.message, event.since, event.occasion)
        except ClusterError as error:
            if not error.refusal:
                raise
            log.warning("event refused reason=%s message=%s error=%s", event.reason, event.message, error)

    def publish(self, document: Object, status: statuses.Status, guarded: bool = False) -> None:
        """Write the status if it differs from the one that was read, and post an Event for every condition that
        changed. `guarded`: as for `write`."""
        previous: dict[str, Any] = document.get("status", {})
        if status.release is None and "release" in previous:  # it is kept while a spec is refused
            before = msgspec.convert(previous["release"], ServiceRelease)
            status = msgspec.structs.replace(status, release=before)
        current = msgspec.to_builtins(msgspec.structs.replace(status, operator=self._operator))
        if statuses.same(current, previous):
            return
        self.write(document, current, guarded)
        for each in status_events(previous, status):
            self.post(document, each)

    def write(self, document: Object, status: dict[str, Any], guarded: bool) -> None:
        """Write a status. `guarded`: it holds what must not be lost, so the write is refused where the status has
        changed since it was read."""
        metadata = document["metadata"]
        version = metadata.get("resourceVersion", "") if guarded else ""
        after = self._cluster.set_status(metadata["namespace"], metadata["name"], status, version)
        document["metadata"] = {**metadata, "resourceVersion": after}

    def timestamp(self) -> str:
        """The time now as Kubernetes writes it."""
        return self._now().strftime("%Y-%m-%dT%H:%M:%SZ")
