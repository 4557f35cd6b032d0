"""Finds the certain tokens of a forced text: those that no continuation would tokenize differently. Pure.

In encodings where every prefix of the tokens is the encoding of its own text, as in BPE and unigram models, a
continuation changes tokens only by one token across the end of the text. So the tokens before any such token of the
vocabulary are certain. Pre-tokenizers look one character ahead in white space, so white space at the end is not
certain either. The tests compare this with whole words that follow.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import lru_cache

_TAIL = 8
"""The number of tokens before the forced text that may affect its encoding."""


class Extensions:
    """The tokens of a vocabulary, sorted by bytes, to find those that begin with a text and are longer."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        pairs = sorted((text, token) for token, text in enumerate(tokens) if text)
        self._texts = [text for text, _ in pairs]
        self._ids = [token for _, token in pairs]
        self.longest = max(map(len, self._texts), default=0)

    def of(self, text: bytes) -> list[int]:
        """The tokens that begin with `text` and are longer."""
        first = bisect_left(self._texts, text)
        while first < len(self._texts) and self._texts[first] == text:
            first += 1
        return self._ids[first : bisect_left(self._texts, _after(text))] if text else []


def _after(text: bytes) -> bytes:
    """The smallest bytes greater than all that begin with `text`."""
    kept = text.rstrip(b"\xff")
    return kept[:-1] + bytes([kept[-1] + 1]) if kept else b"\xff" * (len(text) + 256)


class ForcedText:
    """Turns forced text into its certain tokens. Thread-safe."""

    def __init__(self, tokens: Sequence[bytes], encode: Callable[[str], list[int]]) -> None:
        self._tokens = tokens
        self._extensions = Extensions(tokens)
        self._encode = lru_cache(maxsize=4096)(lambda text: tuple(encode(text)))

    def tokens(
        self, before: Sequence[int], forced: bytes, ends: bool, allowed: Callable[[bytes, list[int]], bool]
    ) -> list[int]:
        """The certain tokens of `forced`, which follows the tokens `before`; with `ends` nothing follows it.

        `allowed(text, tokens)`: whether one of `tokens` may follow `text`, a beginning of `forced`.
        """
        whole = _characters(forced)
        if not whole:
            return []
        context, tail = self._context(before)
        if context is None:
            return []
        ends = ends and len(whole) == len(forced)
        encoded = self._encode(context + whole.decode())
        if encoded[: len(tail)] != tail:  # what is before is no tokenizer's choice, and stays
            context, tail = "", ()
            encoded = self._encode(whole.decode())
        found = encoded[len(tail) :]
        if b"".join(self._tokens[token] for token in found) != whole:  # the tokenizer changes some characters
            return []
        if ends:
            return list(found)
        for length in range(1, min(len(forced), self._extensions.longest) + 1):
            across = self._extensions.of(forced[-length:])
            if across and allowed(forced[:-length], across):
                found = self._common(found, context, tail, forced[:-length])
            if not found:
                return []
        bare = forced.rstrip()
        if len(bare) < len(forced):
            found = self._common(found, context, tail, bare)
        return list(found)

    def _common(
        self, found: tuple[int, ...], context: str, tail: tuple[int, ...], shorter: bytes
    ) -> tuple[int, ...]:
        """The common beginning of `found` and the tokens of a shorter text."""
        encoded = self._encode(context + _characters(shorter).decode())
        if encoded[: len(tail)] != tail:
            return ()
        same = 0
        for one, other in zip(found, encoded[len(tail) :], strict=False):
            if one != other:
                break
            same += 1
        return found[:same]

    def _context(self, before: Sequence[int]) -> tuple[str | None, tuple[int, ...]]:
        """The text of the last tokens, in complete characters, and these tokens; None where it ends within a
        character.
        """
        for first in range(max(0, len(before) - _TAIL), len(before)):
            text = b"".join(self._tokens[token] for token in before[first:])
            try:
                return text.decode(), tuple(before[first:])
            except UnicodeDecodeError:
                continue
        ends_whole = not before or _characters(self._tokens[before[-1]]) == self._tokens[before[-1]]
        return ("" if ends_whole else None), ()


def _characters(text: bytes) -> bytes:
    """The complete characters at the beginning of `text`."""
    try:
        text.decode()
        return text
    except UnicodeDecodeError as error:
        return text[: error.start]
