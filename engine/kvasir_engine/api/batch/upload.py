"""A form with a file, streamed to disk."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from kvasir_engine.api.errors import ApiError, bad_request, client_left

MOST_FIELD = 1000
MOST_PARTS = 16
MOST_HEADERS = 4096


@dataclass
class Form:
    """The fields, and the name and size of the only file."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None
    size: int = 0


class _Parts:
    """The parser's callbacks. Raises ApiError."""

    def __init__(self, out: BinaryIO, most: int) -> None:
        self.form = Form()
        self.ended = False
        self._out = out
        self._most = most
        self._parts = 0
        self._header = bytearray()
        self._header_value = bytearray()
        self._headers: dict[bytes, bytes] = {}
        self._name = ""
        self._text: bytearray | None = None

    def on_part_begin(self) -> None:
        self._parts += 1
        if self._parts > MOST_PARTS:
            raise bad_request(f"The form has more than {MOST_PARTS} parts.", code=None)
        self._headers = {}

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]
        self._check_headers()

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]
        self._check_headers()

    def _check_headers(self) -> None:
        size = sum(len(key) + len(value) for key, value in self._headers.items())
        if size + len(self._header) + len(self._header_value) > MOST_HEADERS:
            raise bad_request("A part of the form has headers that are too large.", code=None)

    def on_header_end(self) -> None:
        self._headers[bytes(self._header).lower()] = bytes(self._header_value)
        self._header.clear()
        self._header_value.clear()

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._name = options.get(b"name", b"").decode(errors="replace")
        if not self._name:
            raise bad_request("A part of the form has no name.", code=None)
        if self._name in self.form.fields or (self._name == "file" and self.form.filename is not None):
            raise bad_request(f"'{self._name[:100]}' is there twice.", self._name)
        if self._name == "file":
            filename = options.get(b"filename")
            if filename is None:
                raise bad_request("Invalid 'file': expected a file, got text.", "file")
            self.form.filename = filename.decode(errors="replace").replace("\\", "/").rsplit("/", 1)[-1][:255]
            self._text = None
        else:
            self._text = bytearray()

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._text is not None:
            self._text += data[start:end]
            if len(self._text) > MOST_FIELD:
                raise bad_request(f"Invalid '{self._name[:100]}': longer than {MOST_FIELD} bytes.", self._name)
            return
        self.form.size += end - start
        if self.form.size > self._most:
            message = f"The file is larger than {self._most} bytes."
            raise ApiError(413, message, param="file", code="request_too_large")
        self._out.write(data[start:end])

    def on_part_end(self) -> None:
        if self._text is not None:
            self.form.fields[self._name] = self._text.decode(errors="replace")

    def on_end(self) -> None:
        self.ended = True


async def read_upload(request: Request, path: Path, most: int) -> Form:
    """The request's form; its field `file`, of `most` bytes at most, becomes the file at `path`.

    Raises ApiError, OSError.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise bad_request("Unsupported 'Content-Type': expected 'multipart/form-data' with a boundary.", code=None)
    with path.open("xb") as out:
        parts = _Parts(out, most)
        names = ("part_begin", "header_field", "header_value", "header_end", "headers_finished", "part_data")
        callbacks = {f"on_{name}": getattr(parts, f"on_{name}") for name in (*names, "part_end", "end")}
        try:
            parser = MultipartParser(boundary, callbacks)  # type: ignore[arg-type]
            async for data in request.stream():
                parser.write(data)
        except ClientDisconnect:
            raise client_left() from None
        except FormParserError as error:
            raise bad_request(f"We could not parse the form of your request: {error}.", code=None) from None
    if not parts.ended:
        raise bad_request("The form of your request is incomplete.", code=None)
    return parts.form
