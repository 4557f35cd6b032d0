"""Estimates what a regex costs before it is compiled."""

import itertools
import re

from kvasir_engine.grammar.base import GrammarError
from kvasir_engine.grammar.limits import MOST_REPEATS

_COUNT = re.compile(r"\{(\d+)(?:(,)(\d*))?\}")


def check_repeats(regex: str, part: str) -> None:
    """Raises GrammarError where counted repetitions make more than `MOST_REPEATS` copies of a part."""
    heaviest = [1]  # of what the open groups hold so far
    last = 1  # the weight of the piece that a count would repeat
    at = 0
    while at < len(regex):
        character = regex[at]
        count = _COUNT.match(regex, at) if character == "{" else None
        if count:
            times = int((count[3] or count[1])[:9])
            last *= max(1, times)
            heaviest[-1] = max(heaviest[-1], last)
            if last > MOST_REPEATS:
                raise GrammarError(part, f"a regex that repeats something more than {MOST_REPEATS} times")
            at = count.end()
            continue
        if character == "(":
            heaviest.append(1)
        elif character == ")" and len(heaviest) > 1:
            last = heaviest.pop()
            heaviest[-1] = max(heaviest[-1], last)
        elif character == "[":
            at = _end_of_class(regex, at)
            last = 1
        elif character not in "*+?":
            last = 1
        at += 2 if character == "\\" else 1


def _end_of_class(regex: str, at: int) -> int:
    """The index of the bracket that closes the class that begins at `at`."""
    depth, at = 1, at + 1
    at += regex[at : at + 1] == "^"
    at += regex[at : at + 1] == "]"
    while at < len(regex) and depth:
        if regex[at] == "\\":
            at += 1
        elif regex[at] in "[]":
            depth += 1 if regex[at] == "[" else -1
        at += 1
    return at - 1


def text_without(marker: str) -> str:
    """A regex of any text in which `marker` does not occur; of any text where its first character occurs again."""
    first = marker[0]
    if first in marker[1:]:
        return r"(.|\n)*"
    begun, broken = "", ""  # a beginning of the marker, and one with a character that does not go on with it
    for before, character in reversed(list(itertools.pairwise(marker))):
        own, following = re.escape(before), re.escape(character)
        broken = own + (
            f"([^{following}{re.escape(first)}]|{broken})" if broken else f"[^{following}{re.escape(first)}]"
        )
        begun = own + (f"({begun})?" if begun else "")
    other = f"[^{re.escape(first)}]"
    return f"({other}|({begun})*{broken})*({begun})*" if begun else f"{other}*"
