"""Whether a function's parameters are a JSON schema of an object. Pure. Answers are kept: clients repeat tools."""

import json
from functools import lru_cache
from typing import Any

MOST_NESTED = 64


@lru_cache(maxsize=1024)
def fault_of_schema(text: str) -> str | None:
    """What is wrong with a schema, written as JSON; None if it is one."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError

    schema: dict[str, Any] = json.loads(text)
    if schema.get("type") != "object":
        got = json.dumps(schema.get("type"))[:100]
        return f"schema must be a JSON Schema of 'type: \"object\"', got 'type: {got}'"
    if depth_of(schema) > MOST_NESTED:
        return f"it is nested more than {MOST_NESTED} deep"
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        place = "".join(f"[{each}]" if isinstance(each, int) else f".{each}" for each in error.absolute_path)
        return f"at '{place.lstrip('.')[:200]}': {error.message[:300]}" if place else error.message[:300]
    return None


def count_of(value: Any) -> int:
    """How many objects and arrays there are in a value of JSON; of one that is nested too deeply those above."""
    counted = 0
    level = [value]
    for _ in range(MOST_NESTED + 1):
        counted += len(level)
        level = _children(level)
    return counted


def depth_of(value: Any) -> int:
    """How deep a value of JSON is nested, or one more than MOST_NESTED."""
    deepest = 0
    level = [value]
    while level and deepest <= MOST_NESTED:
        deepest += 1
        level = _children(level)
    return deepest


def _children(level: list[Any]) -> list[Any]:
    return [
        child
        for each in level
        for child in (each.values() if isinstance(each, dict) else each)
        if isinstance(child, dict | list)
    ]
