"""The lines of a batch's input file: validation, and which requests were answered."""

from collections.abc import Iterator
from pathlib import Path

import msgspec

from kvasir_engine.api.batch.folder import lines_of
from kvasir_engine.api.batch.schemas import InputLine, LineError

MOST_ERRORS = 20
_DECODER = msgspec.json.Decoder(InputLine)


class _CustomId(msgspec.Struct, frozen=True):
    custom_id: str


_IDS = msgspec.json.Decoder(_CustomId)


def input_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not empty, with their numbers from 1. The last one's end may be missing."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def decoded(line: bytes) -> InputLine:
    """Raises ValueError."""
    try:
        return _DECODER.decode(line)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def check(path: Path, endpoint: str, most_lines: int, most_bytes: int) -> tuple[int, list[LineError]]:
    """The number of requests, and the first errors."""
    seen: set[str] = set()
    errors: list[LineError] = []
    count = 0
    for number, line in input_lines(path):
        count += 1
        error = _fault(line, endpoint, most_bytes, seen)
        if error is not None:
            errors.append(LineError(*error, line=number))
        if len(errors) >= MOST_ERRORS:
            break
        if count > most_lines:
            return count, [LineError("too_many_requests", f"A batch has {most_lines} requests at most.")]
    if count == 0:
        errors.append(LineError("empty_file", "The input file has no requests."))
    return count, errors


def _fault(line: bytes, endpoint: str, most_bytes: int, seen: set[str]) -> tuple[str, str] | None:
    if len(line) > most_bytes:
        return "request_too_large", f"The request is larger than {most_bytes} bytes."
    try:
        request = decoded(line)
    except ValueError as error:
        return "invalid_json_line", f"This line is no request: {str(error)[:500]}."
    if request.url != endpoint:
        return "mismatched_url", f"The url is '{request.url[:100]}', but the batch is for {endpoint}."
    if bytes(request.body)[:1] != b"{":
        return "invalid_request", "The body is no JSON object."
    if request.custom_id in seen:
        return "duplicate_custom_id", f"The custom_id '{request.custom_id[:100]}' is there twice."
    seen.add(request.custom_id)
    return None


def answered(path: Path) -> set[str]:
    """The custom ids of a file of answers."""
    return {_IDS.decode(line).custom_id for line in lines_of(path)}


def custom_ids(data: bytes) -> set[str]:
    """The custom ids of whole lines of answers."""
    return {_IDS.decode(line).custom_id for line in data.splitlines()}
