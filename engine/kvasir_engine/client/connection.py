"""Calls an endpoint over aiohttp: one event loop, kept-alive connections, and errors by kind."""

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any, Self

import aiohttp
import msgspec

from kvasir_engine.client.chunks import AnswerEvent, EventSplitter, ModelListing, error_text
from kvasir_engine.client.endpoint import CallTimeouts, EndpointAddress

MOST_BODY_BYTES = 256 * 2**20
_ERROR_BYTES = 64 * 2**10
_events = msgspec.json.Decoder(AnswerEvent)


class CallError(Exception):
    """A call without a complete answer.

    `kind`: `connect`, `closed` (the connection ended early), `idle` (no byte for too long), `timeout` (of the whole
    call), `http_503` (any status), `error_event` (in a stream) or `protocol` (not an endpoint's answer).
    """

    def __init__(self, kind: str, message: str, status: int = 0, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.kind = kind
        self.status = status
        self.retry_after = retry_after


class EndpointConnection:
    """A client of one endpoint; enter it in the event loop that uses it."""

    def __init__(
        self,
        address: EndpointAddress,
        timeouts: CallTimeouts | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.address = address
        self.timeouts = timeouts or CallTimeouts()
        self._headers = dict(headers or {})
        if address.key:
            self._headers.setdefault("Authorization", f"Bearer {address.key}")

    async def __aenter__(self) -> Self:
        times = self.timeouts
        self._session = aiohttp.ClientSession(
            headers=self._headers,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=times.total, sock_connect=times.connect, sock_read=times.idle),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def models(self) -> list[str]:
        """The model names in `/v1/models`. Raises CallError."""
        async with self._answer("GET", "models", None) as response:
            body = await _whole(response)
        try:
            return [each.id for each in msgspec.json.decode(body, type=ModelListing).data]
        except msgspec.DecodeError as error:
            raise CallError("protocol", f"/v1/models answered no list of models: {error}") from None

    async def ask(self, path: str, body: Mapping[str, Any]) -> bytes:
        """A complete answer. Raises CallError."""
        async with self._answer("POST", path, msgspec.json.encode(body)) as response:
            return await _whole(response)

    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[AnswerEvent, None]:
        """The events of a streamed answer, to its end. Raises CallError, also where the stream breaks off."""
        splitter, finished = EventSplitter(), False
        async with self._answer("POST", path, msgspec.json.encode(body)) as response:
            if response.content_type != "text/event-stream":
                raise CallError("protocol", f"the answer to a stream is of type {response.content_type}")
            async for data in response.content.iter_any():
                try:
                    events = [_events.decode(each) for each in splitter.feed(data)]
                except ValueError as error:  # msgspec's are of it too
                    raise CallError("protocol", f"an event is not as OpenAI's: {error}") from None
                for event in events:
                    if event.error is not None:
                        raise CallError("error_event", error_text(msgspec.json.encode(event.error)))
                    for choice in event.choices:
                        finished |= choice.finish_reason is not None
                        if choice.error is not None:
                            raise CallError("error_event", error_text(msgspec.json.encode(choice.error)))
                    yield event
        if not (splitter.done or finished):
            raise CallError("closed", "the stream ended before the answer did")

    @contextlib.asynccontextmanager
    async def _answer(self, method: str, path: str, data: bytes | None) -> AsyncIterator[aiohttp.ClientResponse]:
        url = self.address.url(path)
        headers = {"Content-Type": "application/json"} if data is not None else {}
        try:
            async with self._session.request(
                method, url, data=data, headers=headers, allow_redirects=False, read_bufsize=2**18
            ) as response:
                if response.status != 200:
                    said = error_text(await response.content.read(_ERROR_BYTES)) or response.reason or ""
                    after = response.headers.get("Retry-After", "")
                    wait = float(after) if after.isdecimal() else 0.0
                    raise CallError(f"http_{response.status}", said, response.status, wait)
                yield response
        except aiohttp.ServerTimeoutError as error:
            if isinstance(error, aiohttp.ConnectionTimeoutError):
                raise CallError("connect", f"no connection within {self.timeouts.connect:g} s") from None
            raise CallError("idle", f"nothing came for {self.timeouts.idle:g} s") from None
        except TimeoutError:
            raise CallError("timeout", f"no whole answer within {self.timeouts.total:g} s") from None
        except aiohttp.ClientConnectorError as error:
            raise CallError("connect", str(error.os_error or error)) from None
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, ConnectionError) as error:
            raise CallError("closed", f"the connection ended: {_reason(error)}") from None
        except aiohttp.ClientError as error:
            raise CallError("protocol", _reason(error)) from None


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


async def _whole(response: aiohttp.ClientResponse) -> bytes:
    parts, size = [], 0
    async for part in response.content.iter_any():
        parts.append(part)
        size += len(part)
        if size > MOST_BODY_BYTES:
            raise CallError("protocol", f"an answer of more than {MOST_BODY_BYTES} bytes")
    return b"".join(parts)
