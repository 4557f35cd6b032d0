"""Checks that a schema has finite values: `{"$ref": "#"}` in a required property has none. Pure."""

from collections.abc import Callable, Iterator
from typing import Any

from kvasir_engine.grammar.base import GrammarError
from kvasir_engine.grammar.pointers import at, pointer

_Holds = Callable[[str], bool]


def check_finite(root: Any) -> None:
    """Raises GrammarError with the path of the first schema whose values are all infinite.

    Compares a least fixpoint (schemas that have a value of some depth) with a greatest one (schemas that are not
    `false`).
    """
    schemas = _reached(root)
    least = _fixpoint(schemas, False)
    greatest = _fixpoint(schemas, True)
    for path, schema in schemas.items():
        if greatest[path] and not least[path] and isinstance(schema, dict):
            raise GrammarError(path, "only a value that never ends satisfies it")


def _reached(root: Any) -> dict[str, Any]:
    """The schemas that a value may have to satisfy, by pointer."""
    found: dict[str, Any] = {}
    left = [""]
    while left:
        path = left.pop()
        if path in found:
            continue
        found[path] = schema = at(root, path)
        if isinstance(schema, dict):
            left += reversed(list(_children(schema, path)))
    return found


def _children(schema: dict[str, Any], path: str) -> Iterator[str]:
    if "$ref" in schema:
        yield schema["$ref"].removeprefix("#")
    for key in ("additionalProperties", "items", "additionalItems"):
        if isinstance(schema.get(key), dict | bool):
            yield pointer(path, key)
    for key in ("anyOf", "allOf", "oneOf", "prefixItems", "items"):
        if isinstance(schema.get(key), list):
            yield from (pointer(pointer(path, key), place) for place in range(len(schema[key])))
    for key in ("properties", "patternProperties"):
        yield from (pointer(pointer(path, key), name) for name in schema.get(key, {}))


def _fixpoint(schemas: dict[str, Any], begin: bool) -> dict[str, bool]:
    """The schemas that have a value; a schema is evaluated again when one of its parts has changed."""
    holds = dict.fromkeys(schemas, begin)
    users: dict[str, list[str]] = {path: [] for path in schemas}
    for path, schema in schemas.items():
        for child in _children(schema, path) if isinstance(schema, dict) else ():
            users[child].append(path)
    left = list(schemas)
    while left:
        path = left.pop()
        if holds[path] == begin and _has_value(schemas[path], path, holds.__getitem__) != begin:
            holds[path] = not begin
            left += users[path]
    return holds


def _has_value(schema: Any, path: str, holds: _Holds) -> bool:
    """Whether `schema` may have a value, given the schemas in it that have one."""
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema and not holds(schema["$ref"].removeprefix("#")):
        return False
    for key, enough in (("anyOf", any), ("oneOf", any), ("allOf", all)):
        if key in schema and not enough(
            holds(pointer(pointer(path, key), place)) for place in range(len(schema[key]))
        ):
            return False
    if "const" in schema or "enum" in schema:
        return True
    types = schema.get("type")
    kinds = {types} if isinstance(types, str) else set(types or ("null",))
    if kinds - {"object", "array"}:
        return True
    return ("object" in kinds and _has_object(schema, path, holds)) or (
        "array" in kinds and _has_array(schema, path, holds)
    )


def _has_object(schema: dict[str, Any], path: str, holds: _Holds) -> bool:
    for name in schema.get("required", ()):
        if name in schema.get("properties", {}):
            if not holds(pointer(pointer(path, "properties"), name)):
                return False
        elif "patternProperties" in schema or "additionalProperties" not in schema:
            continue
        elif not holds(pointer(path, "additionalProperties")):
            return False
    return True


def _has_array(schema: dict[str, Any], path: str, holds: _Holds) -> bool:
    tuple_key = "prefixItems" if "prefixItems" in schema else "items"
    listed = schema.get(tuple_key)
    first = len(listed) if isinstance(listed, list) else 0
    rest = "additionalItems" if first and tuple_key == "items" else "items"
    for place in range(min(int(schema.get("minItems", 0)), first + 1)):
        if place < first:
            if not holds(pointer(pointer(path, tuple_key), place)):
                return False
        elif isinstance(schema.get(rest), dict | bool) and not holds(pointer(path, rest)):
            return False
    return True
