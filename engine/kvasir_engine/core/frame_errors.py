"""Frames that cannot be decoded or encoded: only their own request fails."""

import logging
from collections.abc import Iterator

import msgspec

from kvasir_engine.bounds import Name
from kvasir_engine.protocol import UNREADABLE, BadFrame, Delta, Failure, Leased, Load, Step, ToRouter, encode

log = logging.getLogger("worker")

_NO_LOAD = Load()


class _RequestFrame(msgspec.Struct, tag_field="t", tag=str.lower):
    """The field that all frames of a request have: its id."""

    id: Name


class Submit(_RequestFrame):
    """The frame of this name, of which only the id is decoded."""


class Reserve(_RequestFrame):
    """The frame of this name, of which only the id is decoded."""


class Abort(_RequestFrame):
    """The frame of this name, of which only the id is decoded."""


_decoder: msgspec.msgpack.Decoder[Submit | Reserve | Abort] = msgspec.msgpack.Decoder(Submit | Reserve | Abort)


def request_of(data: bytes) -> str | None:
    """The id of the request of an invalid frame, or `None` if it cannot be decoded."""
    try:
        return _decoder.decode(data).id
    except UNREADABLE:
        return None


def encoded(frame: ToRouter) -> Iterator[bytes]:
    """Encode a frame. If that fails, replace the requests that cannot be encoded by failures.

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
