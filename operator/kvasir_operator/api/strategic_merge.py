"""A pod template over another: the strategic merge that `kubectl patch` does, without its directives. Pure.

- Objects merge field by field. Nothing is removed: `null` never gets past `kubectl apply`, so it is refused.
- Lists in `LISTS_BY_KEY` merge item by item, an item being known by that key. New items come last. A volume
  replaces its namesake whole, since two sources in one volume are no volume.
- Tolerations join: each widens where a pod may go, and none is another's contradiction.
- A probe or hook with a handler takes the place of the handler below it; its times merge.
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
    "resourceClaims": "name",
    "claims": "name",
    "volumeMounts": "mountPath",
    "volumeDevices": "devicePath",
    "ports": "containerPort",
    "hostAliases": "ip",
    "topologySpreadConstraints": "topologyKey",
}
JOINED = ("tolerations",)
_REPLACED_WHOLE = ("volumes", "resourceClaims")
# Of these giving one removes the others.
_ONE_OF = ("value", "valueFrom")
_HANDLERS = ("exec", "httpGet", "tcpSocket", "grpc", "sleep")
_HANDLED = ("startupProbe", "readinessProbe", "livenessProbe", "postStart", "preStop")


def identity(field: str, item: Mapping[str, Any]) -> tuple[Any, ...]:
    """The key of an item of a list in `LISTS_BY_KEY`. A container may have one port for TCP and for UDP."""
    key = item.get(LISTS_BY_KEY[field])
    return (key, item.get("protocol", "TCP")) if field == "ports" else (key,)


def overlay(base: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """`patch` over `base`. Neither is changed."""
    merged = dict(base)
    for name, value in patch.items():
        below = merged.get(name)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            one = _HANDLERS if name in _HANDLED else ()
            merged[name] = overlay(_without(below, one, value), value)
        elif isinstance(value, list) and name in LISTS_BY_KEY:
            merged[name] = _by_key(name, below or [], value)
        elif isinstance(value, list) and name in JOINED:
            merged[name] = [*(below or []), *(item for item in value if item not in (below or []))]
        else:
            merged[name] = value
    return merged


def _without(below: Mapping[str, Any], one: tuple[str, ...], above: Mapping[str, Any]) -> Mapping[str, Any]:
    """`below` without those fields of which `above` has one; where it has the same one, that merges."""
    given = [name for name in one if name in above]
    return {name: value for name, value in below.items() if name not in one or name in given or not given}


def _by_key(name: str, base: list[Any], patch: list[Any]) -> list[Any]:
    merged = {identity(name, item): item for item in base}
    for item in patch:
        key = identity(name, item)
        below = merged.get(key)
        if below is None or name in _REPLACED_WHOLE:
            merged[key] = item
            continue
        merged[key] = overlay(_without(below, _ONE_OF if name == "env" else (), item), item)
    return list(merged.values())
