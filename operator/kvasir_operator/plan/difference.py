"""Whether an object has to be applied again. Pure.

Server-side apply of an unchanged object changes nothing, but costs the API server a write's work at every event. So
an object is applied only when it says something new (its stamp is another: fields that are no longer wanted must be
given up too), or when somebody changed what it says (a wanted value is not there).
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from kvasir_engine.quantity import amount
from kvasir_operator.api import GROUP
from kvasir_operator.api.strategic_merge import LISTS_BY_KEY, identity
from kvasir_operator.render.names import Object

STAMP = f"{GROUP}/applied"


def stamped(item: Object) -> Object:
    """`item` with its own hash as an annotation."""
    text = json.dumps(item, sort_keys=True, separators=(",", ":"))
    stamp = hashlib.sha256(text.encode()).hexdigest()[:16]
    metadata = item["metadata"]
    return {**item, "metadata": {**metadata, "annotations": {**metadata.get("annotations", {}), STAMP: stamp}}}


def differs(desired: Object, live: Object) -> bool:
    """Whether `live` lacks something of `desired`, which is stamped."""
    return not _holds(live, desired, "")


def version(item: Object) -> str:
    """The resourceVersion that was read."""
    return str(item["metadata"].get("resourceVersion", ""))


def uid(item: Object) -> str:
    """The uid that was read."""
    return str(item["metadata"].get("uid", ""))


def guarded(item: Object, live: Object | None) -> Object:
    """`item` with what its writer had read of it: replicas planned from an older state must not be set."""
    if live is None or not (seen := version(live)):
        return item
    return {**item, "metadata": {**item["metadata"], "resourceVersion": seen}}


def _holds(live: Any, desired: Any, field: str) -> bool:
    if isinstance(desired, Mapping):
        return isinstance(live, Mapping) and all(
            name in live and _holds(live[name], value, name) for name, value in desired.items()
        )
    if isinstance(desired, list):
        if not isinstance(live, list):
            return False
        key = LISTS_BY_KEY.get(field)
        if key and all(isinstance(item, Mapping) and key in item for item in (*live, *desired)):
            by_key = {identity(field, item): item for item in live}
            return all(_holds(by_key.get(identity(field, item)), item, "") for item in desired)
        return len(live) == len(desired) and all(_holds(a, b, "") for a, b in zip(live, desired, strict=True))
    # The API server writes quantities its own way (0.5 as 500m).
    return bool(live == desired) or amount(live) == amount(desired) is not None
