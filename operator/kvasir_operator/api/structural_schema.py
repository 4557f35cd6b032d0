"""Structural schemas (the dialect of CustomResourceDefinitions) from msgspec types, and a check against them.

One schema serves both sides: the API server reads it from the CRD, `problems` applies it where there is no API
server (local runs, and fields that a server prunes silently). Unknown fields are problems here.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import inspect

from kvasir_engine.quantity import QUANTITY

Schema = dict[str, Any]

# A limit of a rollout as it is written: a count, or a percentage up to 100.
LIMIT = r"^([0-9]{1,4}|([0-9]|[1-9][0-9]|100)%)$"

_EXAMPLES = {QUANTITY: "a quantity such as 2, 500m or 16Gi", LIMIT: "a count or a percentage such as 1 or 25%"}


class Invalid(msgspec.Struct, frozen=True, order=True):
    """One reason why an object is refused: the field's path (`spec.prefill.replicas`) and a sentence."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def structural(kind: type) -> Schema:
    """The structural schema of a msgspec struct: types, constraints, descriptions and defaults."""
    return _schema(inspect.type_info(kind))


def _schema(kind: inspect.Type) -> Schema:
    match kind:
        case inspect.Metadata():
            return {**_schema(kind.type), **(kind.extra_json_schema or {})}
        case inspect.StructType():
            return _struct(kind)
        case inspect.StrType():
            return _some(type="string", pattern=kind.pattern, minLength=kind.min_length, maxLength=kind.max_length)
        case inspect.IntType():
            return _some(type="integer", minimum=kind.ge, maximum=kind.le)
        case inspect.BoolType():
            return {"type": "boolean"}
        case inspect.LiteralType():
            return {"type": "string", "enum": list(kind.values)}
        case inspect.ListType():
            return _some(type="array", items=_schema(kind.item_type), maxItems=kind.max_length)
        case inspect.DictType(value_type=inspect.AnyType()):
            return {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
        case inspect.DictType():
            values = _schema(kind.value_type)
            return _some(type="object", additionalProperties=values, maxProperties=kind.max_length)
        case inspect.UnionType(types=(other, inspect.NoneType())):
            return _schema(other)  # in a structural schema a field that may be absent is one that isn't required
        case inspect.UnionType(types=(inspect.IntType(), inspect.StrType())):
            return {"anyOf": [{"type": "integer"}, {"type": "string"}], "x-kubernetes-int-or-string": True}
    raise TypeError(f"no structural schema for {kind}")


def _struct(kind: inspect.StructType) -> Schema:
    properties: dict[str, Schema] = {}
    for field in kind.fields:
        schema = _schema(field.type)
        default = field.default
        if default is not msgspec.NODEFAULT and default not in ("", None):
            schema["default"] = _whole(default)
        properties[field.encode_name] = schema
    required = [field.encode_name for field in kind.fields if field.required]
    return _some(type="object", required=required or None, properties=properties)


def _whole(default: object) -> object:
    """A default with all that is below it: API servers run CEL rules on each default as it stands."""
    if not isinstance(default, msgspec.Struct):
        return default
    values = ((field.encode_name, getattr(default, field.name)) for field in msgspec.structs.fields(default))
    return {name: _whole(value) for name, value in values if value not in ("", None, {}, [])}


def _some(**fields: Any) -> Schema:
    return {key: value for key, value in fields.items() if value is not None}


def problems(schema: Mapping[str, Any], value: object, path: str) -> Iterator[Invalid]:
    """Everything in `value` that `schema` does not allow, unknown fields included, in document order."""
    if "anyOf" in schema:
        right_type = isinstance(value, int | str) and not isinstance(value, bool)
        if not right_type or not re.search(schema.get("pattern", ""), str(value)):
            what = _EXAMPLES.get(schema.get("pattern", ""), "an integer or a string")
            yield Invalid(path, f"must be {what}, is {_shown(value)}")
        return
    match schema.get("type"):
        case "object":
            if not isinstance(value, Mapping):
                yield Invalid(path, f"must be an object, is {_shown(value)}")
            elif not schema.get("x-kubernetes-preserve-unknown-fields"):
                yield from _object(schema, value, path)
        case "array":
            if not isinstance(value, Sequence) or isinstance(value, str):
                yield Invalid(path, f"must be a list, is {_shown(value)}")
            elif len(value) > schema.get("maxItems", len(value)):
                yield Invalid(path, f"must have at most {schema['maxItems']} items, has {len(value)}")
            else:
                yield from _repeated(schema, value, path)
                for index, item in enumerate(value):
                    yield from problems(schema["items"], item, f"{path}[{index}]")
        case "integer":
            yield from _integer(schema, value, path)
        case "string":
            yield from _string(schema, value, path)
        case "boolean":
            if not isinstance(value, bool):
                yield Invalid(path, f"must be true or false, is {_shown(value)}")


def _object(schema: Mapping[str, Any], value: Mapping[str, object], path: str) -> Iterator[Invalid]:
    properties: Mapping[str, Any] = schema.get("properties", {})
    if len(value) > schema.get("maxProperties", len(value)):
        yield Invalid(path, f"must have at most {schema['maxProperties']} entries, has {len(value)}")
    for name in schema.get("required", []):
        if name not in value:
            yield Invalid(join(path, name), "is required")
    for name, item in value.items():
        if name in properties:
            yield from problems(properties[name], item, join(path, name))
        elif "additionalProperties" in schema:
            yield from problems(schema["additionalProperties"], item, join(path, name))
        else:
            yield Invalid(join(path, name), f"unknown field; known are {', '.join(sorted(properties))}")


def _repeated(schema: Mapping[str, Any], value: Sequence[object], path: str) -> Iterator[Invalid]:
    """Items of a list of type map whose keys are those of an item before."""
    keys, seen = schema.get("x-kubernetes-list-map-keys", ()), []
    for index, item in enumerate(value):
        if isinstance(item, Mapping) and keys:
            found = [item.get(key) for key in keys]
            if found in seen:
                yield Invalid(f"{path}[{index}]", f"{keys[0]} {found[0]!r} is there twice")
            seen.append(found)


def _integer(schema: Mapping[str, Any], value: object, path: str) -> Iterator[Invalid]:
    if isinstance(value, bool) or not isinstance(value, int):
        yield Invalid(path, f"must be an integer, is {_shown(value)}")
    elif value < schema.get("minimum", value):
        yield Invalid(path, f"must be at least {schema['minimum']}, is {value}")
    elif value > schema.get("maximum", value):
        yield Invalid(path, f"must be at most {schema['maximum']}, is {value}")


def _string(schema: Mapping[str, Any], value: object, path: str) -> Iterator[Invalid]:
    if not isinstance(value, str):
        yield Invalid(path, f"must be a string, is {_shown(value)}")
    elif "enum" in schema and value not in schema["enum"]:
        yield Invalid(path, f"must be one of {', '.join(schema['enum'])}, is {_shown(value)}")
    elif len(value) < schema.get("minLength", 0):
        yield Invalid(path, "must not be empty")
    elif len(value) > schema.get("maxLength", len(value)):
        yield Invalid(path, f"must be at most {schema['maxLength']} characters long, has {len(value)}")
    elif not re.search(schema.get("pattern", ""), value) or "\n" in value:  # Python's $ also matches before one
        yield Invalid(path, f"{_shown(value)} does not match {schema['pattern']}")


def join(path: str, name: str) -> str:
    """`path` extended by a field; names that are not plain words go into brackets."""
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        return f"{path}.{name}" if path else name
    return f"{path}[{name}]"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
