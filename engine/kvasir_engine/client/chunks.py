"""The fields of an endpoint's answers that the clients read, and the parser of event streams. Pure.

Unknown fields are skipped: each server has its own.
"""

from typing import Any

import msgspec

MOST_EVENT_BYTES = 64 * 2**20


class CachedTokens(msgspec.Struct, frozen=True):
    cached_tokens: int | None = None


class CallUsage(msgspec.Struct, frozen=True):
    """A call's token counts. `cached` is 0 where the server does not report it."""

    prompt_tokens: int = 0
    completion_tokens: int | None = 0
    prompt_tokens_details: CachedTokens | None = None

    @property
    def cached(self) -> int:
        details = self.prompt_tokens_details
        return (details.cached_tokens or 0) if details else 0


class StreamDelta(msgspec.Struct, frozen=True):
    """`reasoning` is vLLM's newer name of `reasoning_content`."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None


class StreamChoice(msgspec.Struct, frozen=True):
    """One choice of an event, of either endpoint."""

    index: int = 0
    text: str | None = None
    delta: StreamDelta | None = None
    finish_reason: str | None = None
    error: Any = None

    @property
    def content(self) -> str:
        """The text of the answer."""
        return self.text or (self.delta.content if self.delta else None) or ""

    @property
    def thought(self) -> str:
        """The text of the reasoning."""
        return (self.delta.reasoning_content or self.delta.reasoning or "") if self.delta else ""

    @property
    def generated(self) -> bool:
        """Whether the event has a token: not if it has only the role, or only the end."""
        return bool(self.content or self.thought or (self.delta and self.delta.tool_calls))


class AnswerEvent(msgspec.Struct, frozen=True):
    """An event of a stream. `error` is OpenAI's, sent instead of the rest."""

    choices: list[StreamChoice] = []
    usage: CallUsage | None = None
    error: Any = None


class ListedModel(msgspec.Struct, frozen=True):
    id: str


class ModelListing(msgspec.Struct, frozen=True):
    data: list[ListedModel]


class EventSplitter:
    """Splits bytes into the data of whole events. Raises ValueError for an event that is too long."""

    def __init__(self) -> None:
        self._rest = b""
        self.done = False
        """`[DONE]` was read."""

    def feed(self, data: bytes) -> list[bytes]:
        """The events that are complete now; comments and other fields of server-sent events are skipped."""
        self._rest += data
        if b"\r" in self._rest:
            # a pair may be cut in two, so that its first half waits
            held = b"\r" if self._rest.endswith(b"\r") else b""
            self._rest = self._rest.removesuffix(b"\r").replace(b"\r\n", b"\n").replace(b"\r", b"\n") + held
        *whole, self._rest = self._rest.split(b"\n\n")
        if len(self._rest) > MOST_EVENT_BYTES:
            raise ValueError(f"an event of more than {MOST_EVENT_BYTES} bytes")
        found = []
        for event in whole:
            if event.startswith(b"data:") and b"\n" not in event:
                lines = [event[5:]]
            else:
                lines = [line[5:] for line in event.split(b"\n") if line.startswith(b"data:")]
            text = b"\n".join(line.removeprefix(b" ") for line in lines)
            if text == b"[DONE]":
                self.done = True
            elif text:
                found.append(text)
        return found


def error_text(body: bytes) -> str:
    """An error body's text in one line: OpenAI's message if it has one."""
    try:
        found = msgspec.json.decode(body)
        inner = found.get("error", found) if isinstance(found, dict) else found
        text = inner.get("message", inner) if isinstance(inner, dict) else inner
    except msgspec.DecodeError:
        text = body.decode(errors="replace")
    return " ".join(str(text).split())[:500]
