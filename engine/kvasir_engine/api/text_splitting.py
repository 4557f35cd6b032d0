"""Finds places where a long text can be cut without changing its tokens. Pure."""

import re
from collections.abc import Callable, Sequence

PIECE = 32_768
"""Characters that are encoded at once, where the text has a safe place for a cut."""
MOST_PIECE = 4 * PIECE
_LOOK_BACK = 4096
_MOST_TRIED = 16
_WINDOW = 128

# A letter, one character that is none, a letter: every splitter of words begins a new one at the character between.
_PLACES = re.compile(r"[^\W\d_](?=[\W_][^\W\d_])")
_PROBE = "The quick brown fox, which jumps over a lazy dog; it is naïve"

Encode = Callable[[str], Sequence[int]]


def _apart(text: str, at: int, encode: Encode) -> bool:
    """Whether a cut at `at` leaves the tokens around it unchanged."""
    left, right = text[max(0, at - _WINDOW) : at], text[at : at + _WINDOW]
    return [*encode(left), *encode(right)] == list(encode(left + right))


def divisible(encode: Encode) -> bool:
    """Whether texts can be cut: not where the tokenizer adds a prefix to every text."""
    return all(_apart(_PROBE, match.end(), encode) for match in _PLACES.finditer(_PROBE))


def end_of_piece(text: str, start: int, encode: Encode) -> int:
    """Where to cut `text` next, at most `MOST_PIECE` characters after `start`.

    A run of that many characters without a safe place, a number or one word, is cut all the same: its tokens still
    make up the text, though one or two may differ.
    """
    for length in range(PIECE, MOST_PIECE + 1, PIECE):
        end = start + length
        if end >= len(text):
            return len(text)
        found = list(_PLACES.finditer(text, end - _LOOK_BACK, end))
        for match in reversed(found[-_MOST_TRIED:]):
            if _apart(text, match.end(), encode):
                return match.end()
    end = start + MOST_PIECE
    return next((at for at in range(end, end - _WINDOW, -1) if _apart(text, at, encode)), end)
