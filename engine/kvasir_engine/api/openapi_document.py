"""The OpenAPI document of the served endpoints, from the structs that bodies are decoded to. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from kvasir_engine.api.errors import AnthropicErrorBody, ErrorBody
from kvasir_engine.api.field_limits import ONLY, WITHIN, Schema, limits

Parameters = Mapping[str, tuple[str, Schema]]
_REF = "#/components/schemas/{name}"


@dataclass(frozen=True)
class Operation:
    """One endpoint. `events`: what a stream's events are, for those that stream; `request` may be a form's schema.

    `parameters` are those of the path and the query, by name, with their places and schemas.
    """

    method: str
    path: str
    summary: str
    request: type[msgspec.Struct] | Schema | None = None
    answer: type[msgspec.Struct] | str = "application/json"
    events: type[msgspec.Struct] | None = None
    parameters: Parameters | None = None
    error: type[msgspec.Struct] = ErrorBody


def _structs(operations: Sequence[Operation]) -> list[type[msgspec.Struct]]:
    found: dict[type[msgspec.Struct], None] = {ErrorBody: None, AnthropicErrorBody: None}
    for each in operations:
        for kind in (each.request, each.answer, each.events):
            if isinstance(kind, type):
                found[kind] = None
    return list(found)


def _held(schema: Schema, by_type: Mapping[str, Schema]) -> Schema:
    """`schema` with the constraints on its values of each type."""
    if "anyOf" in schema:
        return {**schema, "anyOf": [_held(each, by_type) for each in schema["anyOf"]]}
    kind = schema.get("type")
    return {**schema, **by_type.get(kind, {})} if isinstance(kind, str) else schema


def _limited(name: str, component: Schema, by_field: Mapping[str, Mapping[str, Schema]]) -> Schema:
    properties = {
        field: {"enum": ONLY[name][field]}
        if field in ONLY.get(name, {})
        else _held(schema, by_field.get(f"{name}.{field}", by_field.get(field, {})))
        for field, schema in component.get("properties", {}).items()
    }
    return {**component, "properties": properties, **WITHIN.get(name, {})} if properties else component


def _json(kind: type[msgspec.Struct]) -> Schema:
    return {"application/json": {"schema": {"$ref": _REF.format(name=kind.__name__)}}}


def _described(operation: Operation) -> Schema:
    content: Schema = {}
    if isinstance(operation.answer, type):
        content |= _json(operation.answer)
    else:
        content[operation.answer] = {"schema": {}}
    if operation.events is not None:
        content["text/event-stream"] = {"schema": {"$ref": _REF.format(name=operation.events.__name__)}}
    described: Schema = {
        "summary": operation.summary,
        "responses": {
            "200": {"description": "The answer.", "content": content},
            "default": {"description": "An error.", "content": _json(operation.error)},
        },
    }
    if isinstance(operation.request, type):
        described["requestBody"] = {"required": True, "content": _json(operation.request)}
    elif operation.request is not None:
        described["requestBody"] = {"required": True, "content": operation.request}
    if operation.parameters:
        described["parameters"] = [
            {"name": name, "in": place, "required": place == "path", "schema": schema}
            for name, (place, schema) in operation.parameters.items()
        ]
    return described


def document(
    operations: Sequence[Operation], requests: Sequence[str], version: str, model: str, vocab_size: int
) -> dict[str, Any]:
    """The whole document. The structs named in `requests` show their limits."""
    _, components = msgspec.json.schema_components(_structs(operations), ref_template=_REF)
    by_field = limits(model, vocab_size)
    schemas = {
        name: _limited(name, schema, by_field) if name in requests else schema
        for name, schema in components.items()
    }
    paths: dict[str, Schema] = {}
    for each in operations:
        paths.setdefault(each.path, {})[each.method] = _described(each)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Kvasir", "version": version},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }
