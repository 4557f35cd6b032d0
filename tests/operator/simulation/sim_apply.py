"""Server-side apply as the API server does it: fields have managers; what theirs no longer says goes. Pure.

A field is the path of a leaf; lists with a merge key are walked by it, other lists are leaves.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

Object = dict[str, Any]
Step = str | tuple[str, str]
Path = tuple[Step, ...]
Managers = dict[str, frozenset[Path]]

# x-kubernetes-list-map-keys of the types that are used here.
KEYS = {
    "containers": "name",
    "env": "name",
    "volumes": "name",
    "volumeMounts": "mountPath",
    "ports": "name",
    "ownerReferences": "uid",
    "conditions": "type",
}
# What says which object is meant, and what only the server writes.
_IDENTITY = {("apiVersion",), ("kind",), ("metadata", "name"), ("metadata", "namespace")}
_SERVERS = {("metadata", "uid"), ("metadata", "resourceVersion"), ("metadata", "generation")}


class Conflict(Exception):
    """Another manager has a field, with another value, and `force` was not given."""


def leaves(value: Any) -> dict[Path, Any]:
    """Every field of an object with its value."""
    return {path: leaf for path, leaf in _walk(value, ()) if path not in _IDENTITY | _SERVERS}


def _walk(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            key = KEYS.get(name)
            if key and isinstance(item, list) and item and all(isinstance(i, Mapping) and key in i for i in item):
                for each in item:
                    yield from _walk(each, (*path, name, (key, str(each[key]))))
            else:
                yield from _walk(item, (*path, name))
    else:
        yield path, value


def apply(live: Object, managers: Managers, manager: str, body: Object, *, force: bool) -> tuple[Object, Managers]:
    """`live` and its managers after `manager` applied `body`; nothing given is changed. Raises Conflict."""
    said = leaves(body)
    others = {name: fields for name, fields in managers.items() if name != manager}
    now = leaves(live)
    taken = {p for p, v in said.items() if p in now and now[p] != v and any(p in f for f in others.values())}
    if taken and not force:
        raise Conflict(f"conflict: {sorted(map(str, taken))[0]} has another manager")
    result = copy.deepcopy(live)
    kept: frozenset[Path] = frozenset().union(*others.values())
    for path in sorted(managers.get(manager, frozenset()) - said.keys() - kept, key=_is_key):
        _remove(result, path)
    for path, value in said.items():
        if path not in now or now[path] != value:
            _set(result, path, copy.deepcopy(value))
    after = {name: fields - taken for name, fields in others.items()}
    return result, {**after, manager: frozenset(said)}


def _is_key(path: Path) -> bool:
    """An item's key goes last: the others are found by it."""
    return len(path) > 1 and isinstance(path[-2], tuple) and path[-2][0] == path[-1]


def update(live: Object, managers: Managers, manager: str, path: Path, value: Any) -> tuple[Object, Managers]:
    """`live` and its managers after `manager` set one field, by an update that asks nobody."""
    result = copy.deepcopy(live)
    _set(result, path, value)
    after = {name: fields - {path} for name, fields in managers.items()}
    return result, {**after, manager: after.get(manager, frozenset()) | {path}}


def _set(target: Any, path: Path, value: Any) -> None:
    for at, step in enumerate(path[:-1]):
        following = path[at + 1]
        if isinstance(step, tuple):
            target = _item(target, step)
        else:
            below = target.get(step)
            fitting = isinstance(below, list) if isinstance(following, tuple) else isinstance(below, dict)
            if not fitting:
                target[step] = [] if isinstance(following, tuple) else {}
            target = target[step]
    last = path[-1]
    assert isinstance(last, str)
    target[last] = value


def _item(items: list[Any], step: tuple[str, str]) -> Any:
    key, name = step
    found = next((item for item in items if str(item.get(key)) == name), None)
    if found is None:
        found = {key: name}
        items.append(found)
    return found


def _remove(target: Any, path: Path) -> None:
    """Take a field out, and what it leaves empty."""
    trail = []
    for step in path[:-1]:
        if isinstance(step, tuple):
            below = next((item for item in target if str(item.get(step[0])) == step[1]), None)
        else:
            below = target.get(step) if isinstance(target, dict) else None
        if below is None:
            return
        trail.append((target, step, below))
        target = below
    if isinstance(target, dict):
        target.pop(path[-1], None)
    for holder, step, below in reversed(trail):
        if below not in ({}, []):
            return
        if isinstance(step, str):
            del holder[step]
        else:
            holder.remove(below)
