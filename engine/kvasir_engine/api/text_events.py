"""Encodes events that differ only in a text: everything else is encoded once."""

from collections.abc import Callable

import msgspec

PLACE = "\x00kvasir\x00"
"""A placeholder for the text. No model's name or id has it: they are encoded too, without zero bytes."""
_ENCODED = msgspec.json.encode(PLACE)
_encode = msgspec.json.Encoder().encode


class TextEvents:
    """The chunks of one answer. `chunk` is a choice's chunk with `PLACE` for its text."""

    def __init__(self, chunk: Callable[[int], msgspec.Struct]) -> None:
        self._chunk = chunk
        self._around: dict[int, tuple[bytes, bytes]] = {}

    def event(self, index: int, text: str) -> bytes:
        """The bytes of the whole chunk, encoded."""
        around = self._around.get(index)
        if around is None:
            before, _, after = msgspec.json.encode(self._chunk(index)).rpartition(_ENCODED)
            around = self._around[index] = before, after
        return around[0] + _encode(text) + around[1]
