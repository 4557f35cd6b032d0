"""Checks JSON schemas: every keyword is enforced, or refused with its path. Pure."""

import json
import math
from collections.abc import Iterator, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from kvasir_engine.grammar.base import GrammarError
from kvasir_engine.grammar.finite_schemas import check_finite
from kvasir_engine.grammar.limits import (
    MOST_FACTOR,
    MOST_ITEMS,
    MOST_LENGTH,
    MOST_NESTING,
    MOST_PROPERTIES,
    MOST_SCHEMA_VALUES,
)
from kvasir_engine.grammar.pointers import at as value_at
from kvasir_engine.grammar.pointers import pointer
from kvasir_engine.grammar.regexes import check_repeats

_YEAR = "(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
FORMATS_AS_CHECKED = {
    "time": "^[0-9]{2}:[0-9]{2}:[0-5]",
    "date": f"^{_YEAR}-",
    "date-time": f"^{_YEAR}-[^:]*:[0-9]{{2}}:[0-5]",
}
"""What a format has to be besides, as validators of JSON schemas check it: no second 60, and no year 0."""
TYPES = frozenset({"null", "boolean", "integer", "number", "string", "array", "object"})
FORMATS = frozenset({
    "date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri",
})  # fmt: skip
ONE = frozenset({"additionalProperties", "items", "additionalItems"})
SEVERAL = frozenset({"anyOf", "allOf", "oneOf", "prefixItems"})
NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions"})
COUNTS = {
    "minItems": MOST_ITEMS,
    "maxItems": MOST_ITEMS,
    "minProperties": MOST_ITEMS,
    "maxProperties": MOST_ITEMS,
    "minLength": MOST_LENGTH,
    "maxLength": MOST_LENGTH,
}
NUMBERS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})
LABELS = frozenset({
    "title", "description", "default", "example", "examples", "deprecated", "readOnly", "writeOnly", "$comment",
    "$schema", "discriminator", "contentEncoding", "contentMediaType",
})  # fmt: skip
"""Annotations: keywords that describe a value and do not restrict it."""
NEUTRAL = {"uniqueItems": False, "unevaluatedProperties": True, "unevaluatedItems": True, "nullable": False}
"""Keywords that are not enforced, each with the value that restricts nothing."""


def checked_schema(source: str) -> str:
    """The schema as JSON without annotations, property order kept. Raises GrammarError."""
    try:
        schema = json.loads(source)
    except RecursionError:
        raise GrammarError("", f"it is nested more than {MOST_NESTING} levels deep") from None
    except ValueError as error:
        raise GrammarError("", f"it is not JSON: {error}") from None
    _check_size(schema)
    _unsupported_values(schema)
    kept = _Checker(schema).schema(schema, "")
    check_finite(kept)
    return json.dumps(kept)


def _check_size(value: Any) -> None:
    left, seen = [(value, 1)], 0
    while left:
        each, depth = left.pop()
        seen += 1
        if depth > MOST_NESTING:
            raise GrammarError("", f"it is nested more than {MOST_NESTING} levels deep")
        if seen > MOST_SCHEMA_VALUES:
            raise GrammarError("", f"it has more than {MOST_SCHEMA_VALUES} values")
        children = each.values() if isinstance(each, dict) else each if isinstance(each, list) else ()
        left += [(child, depth + 1) for child in children]


def _unsupported_values(value: Any) -> None:
    """Raise GrammarError for values that no answer can have: unpaired surrogates, infinite numbers."""
    left = [value]
    while left:
        each = left.pop()
        if isinstance(each, dict):
            left += [*each.keys(), *each.values()]
        elif isinstance(each, list):
            left += each
        elif isinstance(each, float) and not math.isfinite(each):
            raise GrammarError("", "a number is out of range")
        elif isinstance(each, str) and not _is_text(each):
            raise GrammarError("", f"{each[:40]!a} is not text: a surrogate stands alone")


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Checker:
    def __init__(self, root: Any) -> None:
        self._root = root

    def schema(self, schema: Any, path: str) -> Any:
        """`schema` without keywords that restrict nothing."""
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise GrammarError(path, "a schema has to be an object or a boolean")
        self._check_least(schema, path)
        kept = dict(self._kept(schema, path))
        stricter = FORMATS_AS_CHECKED.get(kept.get("format", ""))
        if stricter is not None and "pattern" in kept:
            kept["allOf"] = [*kept.get("allOf", ()), {"pattern": stricter}]
        elif stricter is not None:
            kept["pattern"] = stricter
        return kept

    def _kept(self, schema: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
        for key, value in schema.items():
            at = pointer(path, key)
            if key in ONE and not isinstance(value, list):
                yield key, self.schema(value, at)
            elif key in SEVERAL or key == "items":
                if not isinstance(value, list) or not (value or key in ("items", "prefixItems")):
                    raise GrammarError(at, "it has to be a list of schemas, and not empty")
                yield key, [self.schema(each, pointer(at, place)) for place, each in enumerate(value)]
            elif key in NAMED:
                yield key, self._named(key, value, at)
            elif not self._is_neutral(key, value, path):
                self._check(key, value, at)
                yield key, value

    def _named(self, key: str, value: Any, at: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise GrammarError(at, "it has to be an object")
        if key in ("properties", "patternProperties") and len(value) > MOST_PROPERTIES:
            raise GrammarError(at, f"it has more than {MOST_PROPERTIES} entries")
        if key == "patternProperties":
            for each in value:
                check_repeats(each, pointer(at, each))
        return {name: self.schema(each, pointer(at, name)) for name, each in value.items()}

    @staticmethod
    def _is_neutral(key: str, value: Any, path: str) -> bool:
        if key in LABELS or (key.startswith("x-") and key != "x-guidance"):
            return True
        if key == "$id":
            if path:
                raise GrammarError(pointer(path, key), "'$id' is only supported at the top")
            return True
        return key in NEUTRAL and value is NEUTRAL[key]

    @staticmethod
    def _check_least(schema: Mapping[str, Any], path: str) -> None:
        """Refuse a `minProperties` that cannot be enforced: in a text a name may be repeated, and counts once."""
        least = schema.get("minProperties", 0)
        needed = schema["required"] if isinstance(schema.get("required"), list) else ()
        if isinstance(least, int | float) and least > max(1, len(needed)):
            raise GrammarError(
                pointer(path, "minProperties"), "it may be at most 1, or the number of required properties"
            )

    def _check(self, key: str, value: Any, at: str) -> None:
        if key == "$ref":
            self._reference(value, at)
        elif key == "type":
            types = value if isinstance(value, list) else [value]
            if not types or not all(isinstance(each, str) and each in TYPES for each in types):
                raise GrammarError(at, f"{_shown(value)} is not a type")
        elif key == "enum":
            if not isinstance(value, list) or not value:
                raise GrammarError(at, "it has to be a list, and not empty")
        elif key in COUNTS:
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or value % 1:
                raise GrammarError(at, "it has to be a whole number, 0 or more")
            if value > COUNTS[key]:
                raise GrammarError(at, f"it is more than {COUNTS[key]}")
        elif key in NUMBERS:
            self._number(key, value, at)
        elif key == "required":
            if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
                raise GrammarError(at, "it has to be a list of names")
        elif key == "pattern":
            if not isinstance(value, str):
                raise GrammarError(at, "it has to be a regex")
            check_repeats(value, at)
        elif key == "format":
            if value not in FORMATS:
                raise GrammarError(at, f"the format {_shown(value)} is not supported")
        elif key != "const":
            raise GrammarError(at, f"the keyword {_shown(key)} is not supported")

    def _reference(self, value: Any, at: str) -> None:
        if not isinstance(value, str) or not (value == "#" or value.startswith("#/")):
            raise GrammarError(at, f"{_shown(value)} is not within the schema; only '#' and '#/...' are supported")
        try:
            found = value_at(self._root, value.removeprefix("#"))
        except KeyError:
            raise GrammarError(at, f"there is no {_shown(value)}") from None
        if not isinstance(found, dict | bool):
            raise GrammarError(at, f"{_shown(value)} is not a schema")

    @staticmethod
    def _number(key: str, value: Any, at: str) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise GrammarError(at, "it has to be a number")
        if key != "multipleOf":
            return
        try:
            digits = Decimal(repr(value)).normalize().as_tuple()
        except InvalidOperation:
            raise GrammarError(at, "it has to be a number") from None
        factor = int("".join(map(str, digits.digits))) * 10 ** min(max(int(digits.exponent), 0), 9)
        if value <= 0 or factor > MOST_FACTOR:
            raise GrammarError(at, f"it has to be above 0 and at most {MOST_FACTOR} of its last decimal")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."
