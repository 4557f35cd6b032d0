"""Translates structural tags as xgrammar and vLLM write them, free text with constrained parts, to Lark's syntax.

A text is free until a trigger occurs, or until the format begins, and then constrained. The names of special tokens
in `begin`, `end` and triggers stand for these tokens.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from kvasir_engine.grammar.base import GrammarError
from kvasir_engine.grammar.lark_rules import json_rule, regex_literal, text_literal
from kvasir_engine.grammar.limits import MOST_TAG_NESTING, MOST_TAGS
from kvasir_engine.grammar.regexes import check_repeats, text_without

_FREE = "/(.|\\n)*/"


def structural_tag(source: str, whitespace: str | None, special: Mapping[str, int]) -> str:
    """The grammar of `{"type": "structural_tag", ...}`, of the form with `structures` or with `format`."""
    try:
        tag = json.loads(source)
    except (ValueError, RecursionError):
        raise GrammarError("", "it is not JSON") from None
    _fields(tag, "", {"type"}, {"structures", "triggers", "format"})
    if "format" in tag:
        _fields(tag, "", {"type", "format"}, set())
        wanted, path = tag["format"], "/format"
    else:
        _fields(tag, "", {"type", "structures", "triggers"}, set())
        wanted, path = _of_structures(tag), ""
    if tag["type"] != "structural_tag":
        raise GrammarError("/type", "it has to be 'structural_tag'")
    writer = _Writer(whitespace, special)
    body = writer.format(wanted, path, 0)
    return "\n".join([f"start: {body}", *writer.rules])


def _of_structures(tag: dict[str, Any]) -> dict[str, Any]:
    tags = []
    structures = tag["structures"]
    if not isinstance(structures, list):
        raise GrammarError("/structures", "it has to be a list")
    for place, each in enumerate(structures):
        _fields(each, f"/structures/{place}", {"begin", "end"}, {"schema"})
        content = {"type": "json_schema", "json_schema": each.get("schema", True)}
        tags.append({"type": "tag", "begin": each["begin"], "content": content, "end": each["end"]})
    return {"type": "triggered_tags", "triggers": tag["triggers"], "tags": tags}


def _fields(value: Any, path: str, needed: set[str], optional: set[str]) -> None:
    if not isinstance(value, dict):
        raise GrammarError(path, "it has to be an object")
    for key in value:
        if key not in needed | optional:
            raise GrammarError(f"{path}/{key[:80]}", "the field is not known")
    for key in sorted(needed):
        if key not in value:
            raise GrammarError(f"{path}/{key}", "the field is missing")


def _text(value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise GrammarError(path, "it has to be a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise GrammarError(path, "it is not text: a surrogate stands alone") from None
    return value


def _flag(value: dict[str, Any], key: str, path: str) -> bool:
    flag = value.get(key, False)
    if not isinstance(flag, bool):
        raise GrammarError(f"{path}/{key}", "it has to be true or false")
    return flag


class _Writer:
    """Writes the bodies of rules, and the rules that they need."""

    def __init__(self, whitespace: str | None, special: Mapping[str, int]) -> None:
        self.rules: list[str] = []
        self._whitespace = whitespace
        self._special = special
        names = sorted((name for name in special if name), key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, names))) if names else None

    def format(self, value: Any, path: str, depth: int) -> str:
        """The body of a format."""
        if depth > MOST_TAG_NESTING:
            raise GrammarError(path, f"it is nested more than {MOST_TAG_NESTING} levels deep")
        kind = value.get("type") if isinstance(value, dict) else None
        writers = {
            "const_string": self._const,
            "json_schema": self._schema,
            "regex": self._regex,
            "any_text": self._any,
            "sequence": self._sequence,
            "or": self._or,
            "tag": self._tag,
            "triggered_tags": self._triggered,
            "tags_with_separator": self._separated,
        }
        if not isinstance(kind, str) or kind not in writers:
            raise GrammarError(f"{path}/type", f"it has to be one of {', '.join(writers)}")
        return writers[kind](value, path, depth)

    def _rule(self, body: str, attributes: str = "") -> str:
        name = f"t{len(self.rules)}"
        self.rules.append(f"{name}{attributes}: {body}")
        return name

    def text(self, text: str) -> str:
        """A text in which the names of special tokens stand for these tokens."""
        parts: list[str | int] = []
        at = 0
        for found in self._names.finditer(text) if self._names else ():
            parts += [text[at : found.start()], self._special[found[0]]]
            at = found.end()
        parts.append(text[at:])
        return " ".join(
            f"<[{part}]>" if isinstance(part, int) else text_literal(part) for part in parts if part != ""
        )

    def _const(self, value: dict[str, Any], path: str, depth: int) -> str:
        _fields(value, path, {"type", "value"}, set())
        text = self.text(_text(value["value"], f"{path}/value"))
        if not text:
            raise GrammarError(f"{path}/value", "it cannot be empty")
        return text

    def _schema(self, value: dict[str, Any], path: str, depth: int) -> str:
        _fields(value, path, {"type", "json_schema"}, set())
        try:
            return self._rule(json_rule(json.dumps(value["json_schema"]), self._whitespace))
        except GrammarError as error:
            raise GrammarError(f"{path}/json_schema{error.part}", error.reason) from None

    def _regex(self, value: dict[str, Any], path: str, depth: int) -> str:
        _fields(value, path, {"type", "pattern"}, set())
        pattern = _text(value["pattern"], f"{path}/pattern")
        check_repeats(pattern, f"{path}/pattern")
        return self._rule(regex_literal(pattern))

    def _any(self, value: dict[str, Any], path: str, depth: int) -> str:
        _fields(value, path, {"type"}, set())
        return self._rule(_FREE)

    def _list(self, value: dict[str, Any], key: str, path: str) -> list[Any]:
        listed = value[key]
        if not isinstance(listed, list) or not listed:
            raise GrammarError(f"{path}/{key}", "it has to be a list, and not empty")
        if len(listed) > MOST_TAGS:
            raise GrammarError(f"{path}/{key}", f"it has more than {MOST_TAGS} entries")
        return listed

    def _sequence(self, value: dict[str, Any], path: str, depth: int) -> str:
        _fields(value, path, {"type", "elements"}, set())
        listed = self._list(value, "elements", path)
        parts = [self.format(each, f"{path}/elements/{at}", depth + 1) for at, each in enumerate(listed)]
        return self._rule(" ".join(parts))

    def _or(self, value: dict[str, Any], path: str, depth: int) -> str:
        _fields(value, path, {"type", "elements"}, set())
        listed = self._list(value, "elements", path)
        parts = [self.format(each, f"{path}/elements/{at}", depth + 1) for at, each in enumerate(listed)]
        return self._rule(" | ".join(parts))

    def _tag(self, value: dict[str, Any], path: str, depth: int, after: str = "") -> str:
        """A tag without `after`, the beginning of its `begin`."""
        _fields(value, path, {"type", "begin", "content", "end"}, set())
        begin = self.text(_text(value["begin"], f"{path}/begin").removeprefix(after))
        end = _text(value["end"], f"{path}/end")
        content = value["content"]
        if isinstance(content, dict) and content.get("type") == "any_text":
            _fields(content, f"{path}/content", {"type"}, set())
            body = self._until(end, f"{path}/end")
        else:
            body = f"{self.format(content, f'{path}/content', depth + 1)} {self.text(end)}"
        return self._rule(f"{begin} {body}".strip())

    def _until(self, end: str, path: str) -> str:
        """Free text that ends at the first `end`."""
        if not end:
            raise GrammarError(path, "free text needs an end")
        special = self._names.match(end) if self._names else None
        if special:  # whoever reads the text does not tell a marker from its spelling
            return f"{self._rule(regex_literal(text_without(special[0])))} {self.text(end)}"
        return self._rule(f"{_FREE} {text_literal(end)}", "[lazy]")

    def _triggered(self, value: dict[str, Any], path: str, depth: int) -> str:
        _fields(value, path, {"type", "triggers", "tags"}, {"at_least_one", "stop_after_first"})
        triggers = [
            _text(each, f"{path}/triggers/{at}") for at, each in enumerate(self._list(value, "triggers", path))
        ]
        tags = self._list(value, "tags", path)
        by_trigger: dict[str, list[str]] = {trigger: [] for trigger in triggers}
        for at, tag in enumerate(tags):
            where = f"{path}/tags/{at}"
            _fields(tag, where, {"type", "begin", "content", "end"}, set())
            begin = _text(tag["begin"], f"{where}/begin")
            fitting = [trigger for trigger in triggers if trigger and begin.startswith(trigger)]
            if len(fitting) != 1:
                raise GrammarError(f"{where}/begin", "it has to begin with one of the triggers")
            by_trigger[fitting[0]].append(self._tag(tag, where, depth, fitting[0]))
        parts = []
        for at, (trigger, follow) in enumerate(by_trigger.items()):
            if not follow:
                raise GrammarError(f"{path}/triggers/{at}", "no tag begins with it")
            parts.append(self._rule(f"{self._until(trigger, path)} ({' | '.join(follow)})"))
        tagged = self._rule(" | ".join(parts))
        at_least_one, once = _flag(value, "at_least_one", path), _flag(value, "stop_after_first", path)
        if once:
            return tagged if at_least_one else self._rule(f"{tagged} | {_FREE}")
        return self._rule(f"{tagged}{'+' if at_least_one else '*'} {self._rule(_FREE)}")

    def _separated(self, value: dict[str, Any], path: str, depth: int) -> str:
        _fields(value, path, {"type", "tags", "separator"}, {"at_least_one", "stop_after_first"})
        tags = self._list(value, "tags", path)
        one = self._rule(" | ".join(self._tag(each, f"{path}/tags/{at}", depth) for at, each in enumerate(tags)))
        separator = self.text(_text(value["separator"], f"{path}/separator"))
        several = one if _flag(value, "stop_after_first", path) else f"{one} ({separator} {one})*"
        return self._rule(several if _flag(value, "at_least_one", path) else f"({several})?")
