"""Validates types, names and values of a pod template's fields, one by one."""

import json
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from typing import Any

from kvasir_engine.quantity import amount
from kvasir_operator.pod_validation.path import Path, Problem, shown
from kvasir_operator.pod_validation.tables import (
    AT_MOST_ONE,
    EXACTLY_ONE,
    ONE_THING,
    PATTERNS,
    PORT_NAME,
    RANGES,
    VALUES,
)

ROOT = "PodTemplateSpec"
_ACCEPTED: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "int-or-string": (int, str),
    "quantity": (int, float, str),
    "object": (Mapping,),
}
_CALLED = {
    "string": "a string",
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "int-or-string": "an integer or a string",
    "quantity": "a quantity such as 2, 500m or 16Gi",
    "object": "an object",
}


@cache
def _types() -> Mapping[str, Mapping[str, str]]:
    found: Mapping[str, Mapping[str, str]] = json.loads(
        files("kvasir_operator.pod_validation").joinpath("fields.json").read_bytes()
    )["types"]
    return found


def type_problems(template: object) -> Iterator[Problem]:
    """Unknown fields, wrong types, and values that a field cannot have."""
    return _value(ROOT, template, ())


def _value(kind: str, value: Any, path: Path) -> Iterator[Problem]:
    if kind.startswith("["):
        if not isinstance(value, list):
            yield Problem(path, f"must be a list, is {shown(value)}")
            return
        for index, item in enumerate(value):
            yield from _value(kind[1:-1], item, (*path, index))
    elif kind.startswith("{"):
        if not isinstance(value, Mapping):
            yield Problem(path, f"must be an object, is {shown(value)}")
            return
        for key, item in value.items():
            yield from _value(kind[1:-1], item, (*path, key))
    elif kind in _ACCEPTED:
        right = isinstance(value, _ACCEPTED[kind]) and (kind == "boolean" or not isinstance(value, bool))
        if not right or (kind == "quantity" and amount(value) is None):
            yield Problem(path, f"must be {_CALLED[kind]}, is {shown(value)}")
    elif isinstance(value, Mapping):
        yield from _object(kind, value, path)
    else:
        yield Problem(path, f"must be an object, is {shown(value)}")


def _object(kind: str, value: Mapping[str, Any], path: Path) -> Iterator[Problem]:
    known = _types()[kind]
    for name, item in value.items():
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"is {near[0]} meant?" if near else f"known are {', '.join(known)}"
            yield Problem((*path, name), f"unknown field; {hint}")
            continue
        wrong = list(_value(known[name].rstrip("!"), item, (*path, name)))
        yield from wrong or _allowed(kind, name, item, (*path, name))
    for name, what in known.items():
        if what.endswith("!") and name not in value:
            yield Problem((*path, name), "is required")
    yield from _choices(kind, known, value, path)


def _allowed(kind: str, name: str, value: Any, path: Path) -> Iterator[Problem]:
    where = (kind, name)
    if where in VALUES and value not in VALUES[where]:
        said = ", ".join(filter(None, VALUES[where]))
        yield Problem(path, f"must be {'one of ' if len(VALUES[where]) > 1 else ''}{said}, is {shown(value)}")
    if where in RANGES and not RANGES[where][0] <= value <= RANGES[where][1]:
        yield Problem(path, f"must be from {RANGES[where][0]} to {RANGES[where][1]}, is {value}")
    if where in PATTERNS and not PATTERNS[where][0].fullmatch(value):
        yield Problem(path, f"must be {PATTERNS[where][1]}, is {shown(value)}")
    if name == "port" and kind in ("HTTPGetAction", "TCPSocketAction"):
        fits = 1 <= value <= 65535 if isinstance(value, int) else PORT_NAME.fullmatch(value)
        if not fits:
            yield Problem(path, f"must be a port from 1 to 65535 or its name, is {shown(value)}")


def _choices(kind: str, known: Mapping[str, str], value: Mapping[str, Any], path: Path) -> Iterator[Problem]:
    one = tuple(name for name in known if name != "name") if kind in ONE_THING else EXACTLY_ONE.get(kind, ())
    given = [name for name in one if name in value]
    if one and not given:
        few = f": {', '.join(one)}" if kind not in ONE_THING else ", such as emptyDir or secret"
        yield Problem(path, f"needs one of what it can be{few}")
    if len(given) > 1:
        yield Problem((*path, given[1]), f"{given[0]} is there too; only one of them can be")
    both = [name for name in AT_MOST_ONE.get(kind, ()) if value.get(name)]
    if len(both) > 1:
        yield Problem((*path, both[1]), f"{both[0]} is there too; only one of them can be")
