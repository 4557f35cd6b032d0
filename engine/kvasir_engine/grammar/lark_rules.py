"""Parts of a grammar in llguidance's form of Lark's syntax: JSON by a schema, regexes, texts."""

import json
import re

from kvasir_engine.grammar.base import GrammarError
from kvasir_engine.grammar.json_schema import checked_schema
from kvasir_engine.grammar.regexes import check_repeats

FLEXIBLE = r"[ \t\n\r]{1,64}"
"""Enough to indent JSON, but bounded: a model that likes white space would go on with it."""
_WHITESPACE = re.compile(r"(?:[ \t\n\r()\[\]|*+?]|\\[tnrs]|\\x20|\\x0[9aAdD]|\{\d{1,3}(?:,\d{0,3})?\})*")


def json_rule(schema: str, whitespace: str | None) -> str:
    """The body of a rule for JSON that matches a schema."""
    kept = json.loads(checked_schema(schema))
    options: dict[str, object] = {"whitespace_pattern": FLEXIBLE}
    if whitespace == "":
        options = {"whitespace_flexible": False}
    elif whitespace is not None:
        options["whitespace_pattern"] = _whitespace(whitespace)
    if kept is True:
        kept = {}
    if kept is False:
        raise GrammarError("", "no value satisfies false")
    return "%json " + json.dumps({"x-guidance": options, **kept})


def _whitespace(pattern: str) -> str:
    if not _WHITESPACE.fullmatch(pattern):
        raise GrammarError("whitespace", "it has to be a regex of spaces, tabs and ends of lines alone")
    check_repeats(pattern, "whitespace")
    return pattern.replace(r"\s", r"[ \t\n\r]")


def text_literal(text: str) -> str:
    """A text as a literal."""
    return json.dumps(text, ensure_ascii=False)


def regex_literal(regex: str) -> str:
    """A regex between slashes."""
    if not regex:
        return '""'
    if "\0" in regex:
        raise GrammarError("", "a regex cannot hold the character 0")
    return "/" + _escaped_slashes(regex) + "/"


def _escaped_slashes(regex: str) -> str:
    out, at = [], 0
    while at < len(regex):
        if regex[at] == "\\":
            out.append(regex[at : at + 2])
            at += 2
            continue
        out.append({"/": r"\/", "\n": r"\n", "\r": r"\r"}.get(regex[at], regex[at]))
        at += 1
    return "".join(out)
