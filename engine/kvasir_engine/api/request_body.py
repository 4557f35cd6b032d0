"""Reads a request's body, within a limit, and decodes it to one of `schemas`. Any error is a 400."""

from typing import TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from kvasir_engine.api.encoding import OffLoop
from kvasir_engine.api.errors import ApiError, bad_request, client_left, from_validation

MOST_BODY_BYTES = 16 * 2**20
_SPARE_BYTES = 2**20
_BYTES_A_TOKEN = 1024  # 128 prompts of as many tokens as fit, each written as a number
SMALL_BYTES = 64 * 1024
# What msgspec makes of so many values takes 50 ms, in which nothing else runs.
_MOST_NUMBERS = 2_000_000
_MOST_VALUES = 200_000

B = TypeVar("B", bound=msgspec.Struct)


def most_body_bytes(max_length: int) -> int:
    """The limit of a body where sequences have at most `max_length` tokens (0: unknown)."""
    return min(MOST_BODY_BYTES, _SPARE_BYTES + _BYTES_A_TOKEN * max_length) if max_length else MOST_BODY_BYTES


async def read_body(request: Request, kind: type[B], most: int, off_loop: OffLoop) -> B:
    """The request's body, of at most `most` bytes. Raises ApiError."""
    _check_headers(request, most)
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise _too_large(most)
    except ClientDisconnect:
        raise client_left() from None
    if len(body) <= SMALL_BYTES:
        return decode(bytes(body), kind)
    return await off_loop.run_long(lambda: decode(bytes(body), kind))


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"The request body is larger than {most} bytes.", code="request_too_large")


def _check_headers(request: Request, most: int) -> None:
    kind, _, parameters = request.headers.get("content-type", "application/json").lower().partition(";")
    kind = kind.strip()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise bad_request(f"Unsupported 'Content-Type' {_shown(kind)}: expected 'application/json'.", code=None)
    for parameter in parameters.split(";"):
        name, _, value = parameter.partition("=")
        if name.strip() == "charset" and value.strip(' "') not in ("utf-8", "utf8", "us-ascii"):
            raise bad_request(f"Unsupported charset {_shown(value.strip())}: JSON is UTF-8.", code=None)
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("", "identity"):
        raise bad_request(f"Unsupported 'Content-Encoding' {_shown(coding)}: send the body as it is.", code=None)
    length = request.headers.get("content-length")
    if length is None:
        return
    if not (length.isascii() and length.isdigit()):
        raise bad_request(f"Invalid 'Content-Length' {_shown(length)}: expected a number.", code=None)
    if len(length.lstrip("0")) > 18 or int(length) > most:
        raise _too_large(most)


def _shown(value: str) -> str:
    return repr(value[:100])


def decode(body: bytes, kind: type[B]) -> B:
    """Decode a JSON text. Raises ApiError."""
    if not body:
        raise bad_request("The request has no body: expected a JSON object.", code=None)
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        message = f"We could not parse the JSON body of your request: it is not UTF-8 (byte {error.start})."
        raise bad_request(message, code=None) from None
    _check_size(body)
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.DecodeError as error:
        raise from_validation(error) from None
    except RecursionError:
        raise bad_request("The JSON body of your request is nested too deeply.", code=None) from None
    except ValueError as error:  # what a value cannot be made of, such as a number of a million digits
        raise bad_request(f"We could not parse the JSON body of your request: {error}.", code=None) from None


def _check_size(body: bytes) -> None:
    if len(body) <= _MOST_VALUES:
        return
    values = body.count(b",")
    most = _MOST_NUMBERS
    if body.count(b"[") + body.count(b"{") + body.count(b":") > _MOST_VALUES:
        most = _MOST_VALUES
    if values > most:
        raise bad_request(f"The JSON body of your request has more than {most} values.", code=None)
