"""Translates a request's grammar to llguidance's form of Lark's syntax."""

import json
import re
from collections.abc import Mapping

from kvasir_engine.grammar.base import GrammarError
from kvasir_engine.grammar.ebnf import ebnf_to_lark
from kvasir_engine.grammar.lark_rules import json_rule, regex_literal, text_literal
from kvasir_engine.grammar.limits import MOST_CHOICES
from kvasir_engine.grammar.regexes import check_repeats
from kvasir_engine.grammar.structural_tags import structural_tag
from kvasir_engine.protocol import Grammar

HEAD = '%llguidance {"no_forcing": true}\n'
"""Masks have all tokens that may come; forced.py finds the certain ones."""
_OPTIONS = re.compile(r"(?m)^[ \t]*%llguidance\b[ \t]*(.*)$")
_ATTRIBUTE = re.compile(r"\[[^\]\n]*\b(temperature|max_tokens)[ \t]*=")


def to_lark(grammar: Grammar, special: Mapping[str, int]) -> str:
    """The grammar in Lark's syntax, for a tokenizer with these special tokens by name. Raises GrammarError."""
    source = grammar.source
    if grammar.whitespace is not None and grammar.kind not in ("json_schema", "json_object", "structural_tag"):
        raise GrammarError("whitespace", "only JSON has white space of its own")
    match grammar.kind:
        case "json_schema":
            return HEAD + "start: " + json_rule(source, grammar.whitespace)
        case "json_object":
            if source:
                raise GrammarError("", "a JSON object has no schema")
            return HEAD + "start: " + json_rule('{"type": "object"}', grammar.whitespace)
        case "regex":
            check_repeats(source, "")
            return HEAD + "start: " + regex_literal(source)
        case "choice":
            return HEAD + "start: " + " | ".join(map(text_literal, _choices(source)))
        case "lark":
            return HEAD + _own(source)
        case "ebnf":
            return HEAD + _own(ebnf_to_lark(source))
        case "structural_tag":
            return HEAD + structural_tag(source, grammar.whitespace, special)


def _choices(source: str) -> list[str]:
    try:
        choices = json.loads(source)
    except (ValueError, RecursionError):
        choices = None
    if not isinstance(choices, list) or not choices or not all(isinstance(each, str) for each in choices):
        raise GrammarError("", "it has to be a list of texts, and not empty")
    if len(choices) > MOST_CHOICES:
        raise GrammarError("", f"it has more than {MOST_CHOICES} choices")
    if any(not each for each in choices):
        raise GrammarError("", "a choice cannot be empty")
    try:
        json.dumps(choices, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise GrammarError("", "a choice is not text: a surrogate stands alone") from None
    return list(dict.fromkeys(choices))


def _own(source: str) -> str:
    """A user's grammar, with its options replaced by ours."""
    for options in _OPTIONS.finditer(source):
        if options[1].strip() not in ("", "{}"):
            raise GrammarError("%llguidance", "options of the library are not supported")
    attribute = _ATTRIBUTE.search(source)
    if attribute:
        raise GrammarError("", f"the attribute {attribute[1]!r} of a rule is not supported")
    for regex in re.finditer(r"/((?:[^/\\\n]|\\.)+)/", source):
        check_repeats(regex[1], "")
    return _OPTIONS.sub("", source)
