"""Decodes what is readable of a bad frame of several streams, so that only the bad stream ends."""

import logging
from collections.abc import Iterator

import msgspec

from kvasir_engine.bounds import Name
from kvasir_engine.protocol import UNREADABLE, BadFrame, Delta, Failure, Load, ToRouter, decode_to_router
from kvasir_engine.protocol import Step as WholeStep

log = logging.getLogger("router")


class Step(msgspec.Struct, tag_field="t", tag=str.lower):
    """The frame of this name, with undecoded deltas."""

    deltas: list[msgspec.Raw]
    load: Load = Load()


class Leased(msgspec.Struct, tag_field="t", tag=str.lower):
    """The frame of this name, with its id only."""

    id: Name


class _Named(msgspec.Struct):
    id: Name


_parts: msgspec.msgpack.Decoder[Step | Leased] = msgspec.msgpack.Decoder(Step | Leased)
_delta: msgspec.msgpack.Decoder[Delta] = msgspec.msgpack.Decoder(Delta)
_named: msgspec.msgpack.Decoder[_Named] = msgspec.msgpack.Decoder(_Named)


def readable(data: bytes) -> Iterator[ToRouter]:
    """The frame; deltas that cannot be read become failures of their streams. Raises BadFrame."""
    try:
        yield decode_to_router(data)
        return
    except BadFrame as error:
        bad = error
    log.warning("bad frame from a worker error=%r", str(bad))
    try:
        frame = _parts.decode(data)
    except UNREADABLE:
        raise bad from None
    match frame:
        case Leased(id):
            yield WholeStep([_failed(id, bad)], Load())
        case Step(deltas, load):
            yield WholeStep([_readable(bytes(delta), bad) for delta in deltas], load)


def _readable(data: bytes, bad: BadFrame) -> Delta:
    try:
        return _delta.decode(data)
    except UNREADABLE:
        pass
    try:
        return _failed(_named.decode(data).id, bad)
    except UNREADABLE:
        raise bad from None


def _failed(id: str, bad: BadFrame) -> Delta:
    return Delta(id, failure=Failure("bad_frame", f"the worker's frame cannot be read: {bad}"[:4096]))
