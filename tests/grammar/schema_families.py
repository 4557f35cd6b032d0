"""300 JSON schemas of varied features, made by families as JSONSchemaBench's are, written for this repository."""

import random
from collections.abc import Callable, Iterator
from typing import Any

Schema = dict[str, Any]
EACH = 20
WORDS = ["id", "name", "title", "count", "price", "city", "email", "tags", "status", "color", "size", "note"]
WORDS += ["unit", "level", "code", "owner", "parent", "kind"]
SCALARS: list[Schema] = [
    {"type": "string", "maxLength": 20},
    {"type": "integer"},
    {"type": "number"},
    {"type": "boolean"},
    {"type": "null"},
    {"enum": ["red", "green", "grey", 3, None]},
]


def _scalar(rng: random.Random) -> Schema:
    return dict(rng.choice(SCALARS))


def _names(rng: random.Random, most: int = 6) -> list[str]:
    return rng.sample(WORDS, rng.randint(1, most))


def _object(properties: dict[str, Schema], required: list[str], **more: Any) -> Schema:
    return {"type": "object", "properties": properties, "required": required, **more}


def _some(rng: random.Random, names: list[str]) -> list[str]:
    return [name for name in names if rng.random() < 0.6]


def flat(rng: random.Random) -> Schema:
    names = _names(rng)
    closed = {"additionalProperties": False} if rng.random() < 0.7 else {}
    return _object({name: _scalar(rng) for name in names}, _some(rng, names), **closed)


def nested(rng: random.Random, depth: int = 3) -> Schema:
    names = _names(rng, 3)
    inner = {name: nested(rng, depth - 1) if depth and rng.random() < 0.5 else _scalar(rng) for name in names}
    return _object(inner, _some(rng, names), additionalProperties=False)


def arrays(rng: random.Random) -> Schema:
    least = rng.randint(0, 2)
    schema: Schema = {
        "type": "array",
        "items": _scalar(rng),
        "minItems": least,
        "maxItems": least + rng.randint(0, 4),
    }
    if rng.random() < 0.4:
        schema = {"type": "array", "prefixItems": [_scalar(rng), _scalar(rng)], "items": False, "minItems": 1}
    if rng.random() < 0.3:
        schema = {"type": "array", "items": schema, "maxItems": 2}
    return _object({"list": schema}, ["list"], additionalProperties=False)


def enums(rng: random.Random) -> Schema:
    many = rng.choice([2, 20, 500])
    values: list[Any] = [f"{rng.choice(WORDS)} {n}" for n in range(many)]
    values += rng.sample([1, 2.5, True, None, {"a": [1, "x"]}, [], "é\n", ""], 3)
    return _object({"pick": {"enum": values}, "fixed": {"const": rng.choice(values)}}, ["pick", "fixed"])


def unions(rng: random.Random) -> Schema:
    kinds = [
        _object({"kind": {"const": name}, "value": _scalar(rng)}, ["kind", "value"], additionalProperties=False)
        for name in _names(rng, 4)
    ]
    which = "oneOf" if rng.random() < 0.5 else "anyOf"
    others: list[Schema] = [{"type": "string", "maxLength": 5}, {"type": "integer"}]
    return _object({"one": {which: kinds}, "other": {which: others}}, ["one"], additionalProperties=False)


def references(rng: random.Random) -> Schema:
    definitions = {f"d{n}": _object({"x": _scalar(rng)}, ["x"], additionalProperties=False) for n in range(3)}
    definitions["a/b~c"] = {"type": "array", "items": {"$ref": "#/$defs/d0"}, "maxItems": 2}
    properties: dict[str, Schema] = {name: {"$ref": f"#/$defs/d{rng.randrange(3)}"} for name in _names(rng)}
    properties["odd"] = {"$ref": "#/$defs/a~1b~0c"}
    return _object(properties, _some(rng, list(properties)), additionalProperties=False, **{"$defs": definitions})


def recursion(rng: random.Random) -> Schema:
    tree = _object(
        {"value": _scalar(rng), "children": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2}}, ["value"]
    )
    chain = _object(
        {"value": _scalar(rng), "next": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}}, ["value", "next"]
    )
    sum_of = {
        "$ref": "#/$defs/term",
        "$defs": {
            "term": {
                "anyOf": [
                    {"type": "integer"},
                    _object(
                        {"op": {"enum": ["+", "*"]}, "l": {"$ref": "#/$defs/term"}, "r": {"type": "integer"}},
                        ["op", "l", "r"],
                        additionalProperties=False,
                    ),
                ]
            }
        },
    }
    chosen: Schema = rng.choice(
        [{**tree, "additionalProperties": False}, {**chain, "additionalProperties": False}, sum_of]
    )
    return chosen


PATTERNS = [
    "^[A-Z]{2}-[0-9]{3,5}$",
    "^(red|green|blue)$",
    "^\\d{4}$",
    "[a-c]x",
    '^[^ "\\\\]{1,8}$',
    "^(é|日本)+$",
    "^#[0-9a-fA-F]{6}$",
    "^a.b$",
    "^(\\+1 )?\\(?[0-9]{3}\\)? [0-9]{4}$",
    "^$|^x+$",
]


def patterns(rng: random.Random) -> Schema:
    names = _names(rng, 3)
    return _object({name: {"type": "string", "pattern": rng.choice(PATTERNS)} for name in names}, names)


FORMATS = ["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"]


def formats(rng: random.Random) -> Schema:
    chosen = rng.sample(FORMATS, 2)
    return _object(
        {name: {"type": "string", "format": name} for name in chosen}, chosen, additionalProperties=False
    )


def numbers(rng: random.Random) -> Schema:
    low = rng.randint(-1000, 1000)
    bounds: list[Schema] = [
        {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 500)},
        {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": low + 9},
        {"type": "number", "minimum": low / 8, "maximum": low / 8 + 1.5},
        {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        {"type": "integer", "multipleOf": rng.choice([2, 5, 7, 60])},
        {"type": "integer", "minimum": low},
        {"type": "number", "maximum": low},
    ]
    names = _names(rng, 4)
    return _object({name: rng.choice(bounds) for name in names}, names, additionalProperties=False)


def lengths(rng: random.Random) -> Schema:
    least = rng.randint(0, 5)
    return _object(
        {
            "a": {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 9)},
            "b": {"minLength": 3},
        },
        ["a"],
        additionalProperties=False,
    )


def unicode_keys(rng: random.Random) -> Schema:
    odd = ["ключ", "名前", "clé", "a b", 'q"uote', "back\\slash", "new\nline", "😀", "", "/", "$ref", "ümlaut~/x"]
    names = rng.sample(odd, 4)
    return _object({name: _scalar(rng) for name in names}, _some(rng, names), additionalProperties=False)


def open_objects(rng: random.Random) -> Schema:
    more: Schema = rng.choice(
        [
            {"additionalProperties": {"type": "integer"}},
            {"additionalProperties": {"type": "boolean"}, "minProperties": 1, "maxProperties": 4},
            {"patternProperties": {"^x_": {"type": "integer"}}, "additionalProperties": False},
            {"additionalProperties": _scalar(rng), "maxProperties": 3},
        ]
    )
    properties = (
        {} if "minProperties" in more or "maxProperties" in more else {"id": {"type": "string", "maxLength": 5}}
    )
    return {"type": "object", "properties": properties, **more}


def intersections(rng: random.Random) -> Schema:
    first, second = rng.sample(WORDS, 2)
    return {
        "allOf": [
            _object({first: _scalar(rng)}, [first]),
            _object({second: {"type": "integer", "minimum": 0}}, [second]),
            {"properties": {second: {"maximum": rng.randint(0, 99)}}},
        ]
    }


def nullable(rng: random.Random) -> Schema:
    names = _names(rng, 4)
    kinds = ["string", "integer", "boolean", "null", "number"]
    properties: dict[str, Schema] = {name: {"type": rng.sample(kinds, rng.randint(1, 3))} for name in names}
    return _object(properties, names, additionalProperties=False, title="T", description="labels are no bounds")


FAMILIES: list[Callable[[random.Random], Schema]] = [
    flat, nested, arrays, enums, unions, references, recursion, patterns, formats, numbers, lengths, unicode_keys,
    open_objects, intersections, nullable,
]  # fmt: skip


def schemas() -> Iterator[tuple[str, Schema]]:
    """All of them by name, the same at each call."""
    for family in FAMILIES:
        for place in range(EACH):
            yield f"{family.__name__}-{place}", family(random.Random(f"{family.__name__} {place}"))
