"""Frames that cannot be read or written: they fail their own request and no other."""

import logging
from collections.abc import Iterator

import msgspec

from kvasir_engine.bounds import Name
from kvasir_engine.protocol import UNREADABLE, BadFrame, Delta, Failure, Leased, Load, Step, ToRouter, encode

log = logging.getLogger("worker")

_NO_LOAD = Load()


class _RequestFrame(msgspec.Struct, tag_field="t", tag=str.lower):
    """What all frames have that ask for a request: its id."""

    id: Name


class Submit(_RequestFrame):
    """Of the frame of this name only the id."""


class Reserve(_RequestFrame):
    """Of the frame of this name only the id."""


class Abort(_RequestFrame):
    """Of the frame of this name only the id."""


_decoder: msgspec.msgpack.Decoder[Submit | Reserve | Abort] = msgspec.msgpack.Decoder(Submit | Reserve | Abort)


def request_of(data: bytes) -> str | None:
    """The id of the request that a bad frame asks for, if it can be told."""
    try:
        return _decoder.decode(data).id
    except UNREADABLE:
        return None


def encoded(frame: ToRouter) -> Iterator[bytes]:
    """Encode a frame. If it cannot be encoded, fail the requests in it that are at fault.

    Raises BadFrame if the frame belongs to no request.
    """
    try:
        yield encode(frame)
    except BadFrame as error:
        log.exception("a frame cannot be encoded")
        match frame:
            case Step(deltas, load):
                for delta in deltas:
                    yield encode(Step([_sayable(delta)], load))
            case Leased(id):
                yield encode(Step([_failed(id, error)], _NO_LOAD))
            case _:
                raise


def _sayable(delta: Delta) -> Delta:
    try:
        encode(Step([delta], _NO_LOAD))
    except BadFrame as error:
        return _failed(delta.id, error)
    return delta


def _failed(id: str, error: BadFrame) -> Delta:
    return Delta(id, failure=Failure("internal_error", f"the answer cannot be sent: {error}"))
