"""What an API server does with the CEL rules of a CRD, beside running them on objects: it runs them on each default
as it stands, and refuses a CRD whose rules could cost too much. The estimate is no smaller than the server's.
"""

from collections.abc import Iterator
from typing import Any

import celpy
import lark

Schema = dict[str, Any]

RULE_LIMIT, CRD_LIMIT = 10_000_000, 100_000_000
# What an object may have in all, and so a string, list or mapping without a bound (apiserver/pkg/cel: the most
# bytes of a request).
UNBOUNDED = 3 * 1024 * 1024
STRING_FACTOR = 0.1
ENVIRONMENT = celpy.Environment()


def below(schema: Schema) -> Iterator[tuple[str, Schema, int]]:
    """The schemas right below one: name, schema, how many values there may be of it."""
    for name, found in schema.get("properties", {}).items():
        yield name, found, 1
    for key, most in (("items", "maxItems"), ("additionalProperties", "maxProperties")):
        if isinstance(schema.get(key), dict):
            yield "*", schema[key], schema.get(most, UNBOUNDED)


def everywhere(schema: Schema, path: str = "", times: int = 1) -> Iterator[tuple[str, Schema, int]]:
    """Each schema, its path, and how many values there may be of it in one object."""
    yield path, schema, times
    for name, found, most in below(schema):
        yield from everywhere(found, f"{path}.{name}".lstrip("."), times * most)


def failures(schema: Schema, value: Any, path: str) -> Iterator[str]:
    """What the rules at and below `schema` say against `value`, in which nothing is filled in."""
    for rule in schema.get("x-kubernetes-validations", ()):
        program = ENVIRONMENT.program(ENVIRONMENT.compile(rule["rule"]))
        try:
            if not program.evaluate({"self": celpy.json_to_cel(value)}):
                yield f"{path}: {rule['message']}"
        except celpy.CELEvalError as error:
            yield f"{path}: {rule['rule']}: {error}"
    if isinstance(value, dict):
        for name, found in schema.get("properties", {}).items():
            if name in value:
                yield from failures(found, value[name], f"{path}.{name}")
    for index, item in enumerate(value if isinstance(value, list) else ()):
        yield from failures(schema.get("items", {}), item, f"{path}[{index}]")


def bad_defaults(schema: Schema) -> list[str]:
    """What an API server has against the defaults of a CRD."""
    return [
        message
        for path, found, _ in everywhere(schema)
        if "default" in found
        for message in failures(found, found["default"], path)
    ]


def costs(schema: Schema) -> Iterator[tuple[str, str, float]]:
    """Each rule's path, text and greatest cost in one object."""
    for path, found, times in everywhere(schema):
        for rule in found.get("x-kubernetes-validations", ()):
            yield path, rule["rule"], times * cost(found, rule["rule"])


def cost(schema: Schema, rule: str) -> float:
    """The greatest cost of a rule on one value: each step 1, and reading a string, list or mapping by its size."""
    tree = ENVIRONMENT.compile(rule)
    total = 0.0
    for node in tree.iter_subtrees():
        total += 1
        if node.data in ("relation", "addition") and len(node.children) == 2:
            total += sum(read(schema, child) for child in node.children)
        elif node.data == "member_dot_arg":
            subject, *arguments = node.children
            # contains and matches read one for each step in the other; startsWith costs less
            total += read(schema, subject) * max(1.0, *(read(schema, each) for each in arguments))
    return total


def read(schema: Schema, node: Any) -> float:
    """What reading a part of a rule costs, by the size of what it selects from `self`."""
    selected = fields(node)
    size = 64.0 if selected is None else size_of(schema, selected)
    return size * STRING_FACTOR


def fields(node: Any) -> list[str] | None:
    """The fields by which a part of a rule selects from `self`; `None` where it is something else."""
    while isinstance(node, lark.Tree) and len(node.children) == 1 and node.data != "ident":
        node = node.children[0]
    if not isinstance(node, lark.Tree):
        return None
    if node.data == "ident":
        return [] if str(node.children[0]) == "self" else None
    if node.data == "member_dot":
        before = fields(node.children[0])
        return None if before is None else [*before, str(node.children[1])]
    return None


def size_of(schema: Schema, selected: list[str]) -> float:
    """The greatest size of the value that is selected."""
    for name in selected:
        schema = schema["properties"][name]
    if "enum" in schema:
        return max(map(len, schema["enum"]))
    if schema.get("type") in ("integer", "boolean", "number"):
        return 1
    bounds = {"string": "maxLength", "array": "maxItems", "object": "maxProperties"}
    return schema.get(bounds.get(schema.get("type", ""), ""), UNBOUNDED)
