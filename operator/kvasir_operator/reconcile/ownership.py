"""Whose an InferenceService is, where several operators run.

An operator serves the services of its class. Of two with one class the first that comes to a service writes itself
into its status, over the status that was read, so that only one can; the other leaves it alone and says so. One
whose Lease is gone, or was not renewed for a while, is no operator any more: another takes its services over.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

from kvasir_operator.api.kinds import OPERATOR_ANNOTATION
from kvasir_operator.cluster.interface import ClusterError
from kvasir_operator.cluster.lease_candidate import Record
from kvasir_operator.render import Object, Options

# Whether the operator NAMESPACE/LEASE is there: `None` where that cannot be known.
Alive = Callable[[str], bool | None]
# No clock of another machine is trusted: who has not renewed for so long by this one's is gone.
GONE_SECONDS = 60.0


class OtherOperators:
    """Tells other operators that are there from those that are gone, by their Leases."""

    def __init__(
        self, read: Callable[[str, str], Record | None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._read = read
        self._clock = clock
        self._seen: dict[str, tuple[str, float]] = {}

    def __call__(self, operator: str) -> bool:
        """Whether NAMESPACE/LEASE is renewed. Raises ClusterError."""
        namespace, slash, name = operator.partition("/")
        record = self._read(namespace, name) if slash else None
        if record is None:
            return False
        version, since = self._seen.get(operator, ("", 0.0))
        if record.version != version:
            since = self._clock()
            self._seen[operator] = record.version, since
        return self._clock() - since < GONE_SECONDS


def ours(document: Mapping[str, Any], options: Options) -> bool:
    """Whether a service is of this operator's class. What is no text is of none: whoever has none refuses it."""
    spec = document.get("spec")
    wanted = spec.get("operatorClass", "") if isinstance(spec, Mapping) else ""
    return (wanted if isinstance(wanted, str) else "") == options.operator_class


def holder(document: Mapping[str, Any], options: Options, alive: Alive) -> str:
    """The other operator that has this service; empty: this one may have it."""
    recorded = str(document.get("status", {}).get("operator", ""))
    if not options.operator or recorded in ("", options.operator):
        return ""
    try:
        there = alive(recorded)
    except ClusterError as error:
        if not error.final:
            raise
        there = None  # its Lease may not be read: it may be there
    return "" if there is False else recorded


def marked(objects: list[Object], options: Options) -> list[Object]:
    """`objects`, each with the operator that makes it."""
    if not options.operator:
        return objects
    return [
        {
            **item,
            "metadata": {
                **item["metadata"],
                "annotations": {**item["metadata"].get("annotations", {}), OPERATOR_ANNOTATION: options.operator},
            },
        }
        for item in objects
    ]
