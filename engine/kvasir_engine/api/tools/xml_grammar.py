"""Grammars of calls in the forms of XML, for schemas that these forms can be constrained to. Pure.

A value that can only be a string is free text up to its end; others are JSON. No call has an argument that its
schema does not name, unless it names none at all.
"""

import json
import re
from typing import Any

from kvasir_engine.api.tools.tags import Tag, const, either, sequence, tag
from kvasir_engine.api.tools.value_types import STRING, Schema, as_json, resolved, types_of
from kvasir_engine.api.tools.xml_calls import CLOSE, OPEN, XmlFormat
from kvasir_engine.grammar.json_schema import LABELS

_OBJECT = frozenset({"type", "properties", "required", "additionalProperties", "$defs", "definitions", *LABELS})
_BOUNDS = frozenset({"minLength", "maxLength"})
_DEFINITIONS = ("$defs", "definitions")
_ALTERNATIVES = ("anyOf", "oneOf")
MOST_LENGTH = 10_000
"""Of a string with bounds: a regex counts its characters."""
_KEY = re.compile(r"[^<>\s]([^<>\n\r]{0,62}[^<>\s])?")


def call_tag(name: str, schema: Schema, form: XmlFormat) -> Tag | None:
    """A call of a function; None where its schema cannot be expressed."""
    begin = f"{OPEN}\n{form.name}{name}{form.name_end}\n" if form.name else f"{OPEN}{name}\n"
    end = form.call_end if form.call_end == CLOSE else f"{form.call_end}\n{CLOSE}"
    arguments = _arguments(schema, form)
    if arguments is None:
        return None
    content = sequence(*arguments, const(end))
    return {"type": "tag", "begin": begin, "content": content, "end": ""}


def _arguments(schema: Schema, form: XmlFormat) -> list[Tag] | None:
    if not _OBJECT.issuperset(schema):
        return None
    properties, required = schema.get("properties", {}), schema.get("required", [])
    others = schema.get("additionalProperties", True)
    if not properties and not required and others is not False:
        return [_optional(_any_argument(form), many=True)] if others is True else None
    if any(each not in properties for each in required):
        return None
    found = []
    for key, value in properties.items():
        if value is False and key not in required:
            continue
        argument = _argument(key, value, schema, form)
        if argument is None:
            return None
        found.append(argument if key in required else _optional(argument))
    return found


def _optional(argument: Tag, many: bool = False) -> Tag:
    return {
        "type": "tags_with_separator",
        "tags": [{"type": "tag", "begin": "", "content": argument, "end": ""}],
        "separator": "",
        "at_least_one": False,
        "stop_after_first": not many,
    }


def _frame(form: XmlFormat) -> tuple[str, str]:
    """What stands between an argument's name and its value, and behind that but the end's marker."""
    return (f"{form.key_end}\n{form.value}", "") if form.value else (f"{form.key_end}\n", "\n")


def _any_argument(form: XmlFormat) -> Tag:
    before, _ = _frame(form)
    name: Tag = {"type": "regex", "pattern": r"[\w.-]{1,64}"}
    value: Tag = {"type": "tag", "begin": before, "content": {"type": "any_text"}, "end": form.value_end}
    return sequence(const(form.key), name, value, const("\n"))


def _argument(key: str, schema: Any, root: Schema, form: XmlFormat) -> Tag | None:
    if not _KEY.fullmatch(key):
        return None
    opens, closes = _frame(form)
    begin, end = f"{form.key}{key}{opens}", f"{closes}{form.value_end}\n"
    types = types_of(schema, root)
    if "string" not in types:
        within = {name: root[name] for name in _DEFINITIONS if name in root}
        if not _refers_within(schema, within):
            return None
        return tag(begin, {**schema, **within} if within else schema, end)
    found = resolved(schema, root)
    if _plain(found, root):
        free: Tag = {"type": "tag", "begin": begin, "content": {"type": "any_text"}, "end": form.value_end}
        return sequence(free, const("\n"))
    if not isinstance(found, dict):
        return None
    keys = set(found) - LABELS
    if "enum" in keys or "const" in keys:
        written = _written(found, keys, types, form)
        return None if written is None else either(*(const(begin + each + end) for each in written))
    if types == STRING and keys <= {"type", *_BOUNDS}:
        least, most = found.get("minLength", 0), found.get("maxLength", "")
        if any(isinstance(each, int) and each > MOST_LENGTH for each in (least, most)):
            return None
        # The line break belongs to the regex: what fits a regex is none of what follows it.
        text: Tag = {"type": "regex", "pattern": f"[^<]{{{least},{most}}}{closes}"}
        return sequence(const(begin), text, const(f"{form.value_end}\n"))
    return None


def _refers_within(schema: Any, definitions: Schema) -> bool:
    """Whether all references are to definitions, which a value's schema takes along."""
    left = [schema, *definitions.values()]
    while left:
        each = left.pop()
        if isinstance(each, dict):
            reference = each.get("$ref", "#/$defs/")
            if isinstance(reference, str) and not reference.startswith(
                tuple(f"#/{name}/" for name in _DEFINITIONS)
            ):
                return False
            left += each.values()
        elif isinstance(each, list):
            left += each
    return True


def _plain(schema: Any, root: Schema, depth: int = 0) -> bool:
    """Whether any text is a value: nothing but types is asked of it."""
    schema = resolved(schema, root)
    if schema is True:
        return True
    if not isinstance(schema, dict) or depth > 1:
        return False
    keys = set(schema) - LABELS
    if len(keys) == 1 and keys & set(_ALTERNATIVES):
        (alternatives,) = (schema[key] for key in keys)
        return "oneOf" not in keys and all(_plain(each, root, depth + 1) for each in alternatives)
    return keys <= {"type"}


def _written(schema: dict[str, Any], keys: set[str], types: frozenset[str], form: XmlFormat) -> list[str] | None:
    """The texts of the values of an enumeration; None where one has none."""
    if not keys <= {"type", "enum"} and not keys <= {"type", "const"}:
        return None
    values = schema["enum"] if "enum" in schema else [schema["const"]]
    found = []
    for value in values:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        if form.value_end in text or json.loads(as_json(text, types)) != value:
            return None
        found.append(text)
    return found or None
