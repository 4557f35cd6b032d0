"""A pod template over another: the strategic merge that `kubectl patch` does, without its directives. Pure.

- Objects merge field by field. Nothing is removed: `null` never gets past `kubectl apply`, so it is refused.
- Lists in `LISTS_BY_KEY` merge item by item, an item being known by that key. New items come last. A volume
  replaces its namesake whole, since two sources in one volume are no volume.
- Tolerations join: each widens where a pod may go, and none is another's contradiction.
- Every other list is replaced.
"""

from collections.abc import Mapping
from typing import Any

# The merge keys of the Kubernetes API (patchMergeKey of PodSpec and Container).
LISTS_BY_KEY: dict[str, str] = {
    "containers": "name",
    "initContainers": "name",
    "env": "name",
    "volumes": "name",
    "imagePullSecrets": "name",
    "volumeMounts": "mountPath",
    "volumeDevices": "devicePath",
    "ports": "containerPort",
    "hostAliases": "ip",
    "topologySpreadConstraints": "topologyKey",
}
_JOINED = ("tolerations",)
_REPLACED_WHOLE = ("volumes",)
_ONE_OF = ("value", "valueFrom")  # of an env entry: giving one removes the other


def overlay(base: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """`patch` over `base`. Neither is changed."""
    merged = dict(base)
    for name, value in patch.items():
        below = merged.get(name)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            merged[name] = overlay(below, value)
        elif isinstance(value, list) and name in LISTS_BY_KEY:
            merged[name] = _by_key(name, below or [], value)
        elif isinstance(value, list) and name in _JOINED:
            merged[name] = [*(below or []), *(item for item in value if item not in (below or []))]
        else:
            merged[name] = value
    return merged


def _by_key(name: str, base: list[Any], patch: list[Any]) -> list[Any]:
    key = LISTS_BY_KEY[name]
    merged = {item[key]: item for item in base}
    for item in patch:
        below = merged.get(item[key])
        if below is None or name in _REPLACED_WHOLE:
            merged[item[key]] = item
            continue
        if name == "env" and any(field in item for field in _ONE_OF):
            below = {field: value for field, value in below.items() if field not in _ONE_OF}
        merged[item[key]] = overlay(below, item)
    return list(merged.values())
