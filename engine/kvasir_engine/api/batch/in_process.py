"""Sends a request to this process's own application: with the checks and answers of a request from outside."""

import asyncio
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Scope

from kvasir_engine.api.caller import CALLER, Caller


@dataclass(frozen=True)
class HttpAnswer:
    """An HTTP status and a whole body."""

    status: int
    body: bytes


async def ask(app: ASGIApp, path: str, body: bytes, caller: Caller) -> HttpAnswer:
    """The answer to a POST of JSON. Cancelling it counts as the client's disconnect."""
    status, parts = 500, bytearray()
    sent = False

    async def receive() -> Message:
        nonlocal sent
        if sent:
            await asyncio.Event().wait()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        parts.extend(message.get("body", b""))

    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json")],
        "client": None,
        "server": None,
        CALLER: caller,
    }
    try:
        await app(scope, receive, send)
    except Exception:  # it has been answered with a 500, and logged
        if not parts:
            raise
    return HttpAnswer(status, bytes(parts))
