"""Finds the part of a grammar that a library error is about."""

import json
import re
from collections.abc import Iterator
from typing import Any

from llguidance import LLMatcher

from kvasir_engine.grammar.base import GrammarError
from kvasir_engine.grammar.limits import parser_limits
from kvasir_engine.grammar.pointers import pointer
from kvasir_engine.protocol import Grammar

MOST_TRIED = 300
_PLACE = re.compile(r"^(?:at )?(\d+)\((\d+)\): ")


def fault(error: str, grammar: Grammar, schema: Any) -> GrammarError:
    """The library's error in one line, and the part that it is about. `schema`: the compiled schema."""
    lines = [line.strip() for line in error.strip().splitlines()]
    named = [line.removeprefix("error:").strip() for line in lines if line.startswith("error:")]
    first = (lines or ["it cannot be compiled"])[0]
    place = _PLACE.match(first)
    reason = (named[0] if named else _PLACE.sub("", first))[:300].rstrip(".")
    part = ""
    if grammar.kind == "lark" and place:
        part = f"line {max(1, int(place[1]) - 1)}, column {place[2]}"  # one line is ours
    elif grammar.kind == "json_schema":
        part = next((path for path, each in _innermost(schema, "", MOST_TRIED) if _fails(each)), "")
    return GrammarError(part, reason)


def _fails(schema: Any) -> bool:
    lark = "start: %json " + json.dumps(schema)
    return bool(LLMatcher.validate_grammar(lark, limits=parser_limits()))


def _innermost(schema: Any, path: str, most: int) -> Iterator[tuple[str, Any]]:
    """Schemas within a schema that can be compiled alone, the innermost first."""
    found: list[tuple[str, Any]] = []
    left = [(path, schema)]
    while left and len(found) < most:
        at, each = left.pop(0)
        if not isinstance(each, dict):
            continue
        if at and '"$ref"' not in json.dumps(each):
            found.append((at, each))
        for key in ("additionalProperties", "items", "additionalItems"):
            left.append((pointer(at, key), each.get(key)))
        for key in ("anyOf", "allOf", "oneOf", "prefixItems", "items"):
            if isinstance(each.get(key), list):
                left += [(pointer(pointer(at, key), place), one) for place, one in enumerate(each[key])]
        for key in ("properties", "patternProperties", "$defs", "definitions"):
            left += [(pointer(pointer(at, key), name), one) for name, one in each.get(key, {}).items()]
    yield from reversed(found)
