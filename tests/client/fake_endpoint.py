"""An endpoint on loopback that answers by a script, or fails as it is told; and the bodies that it was sent."""

import asyncio
import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

TOKEN = re.compile(r" ?\w|\W")
"""Of the stand's tokenizer: a letter with the space before it, so that a space at a prompt's end merges."""


@dataclass
class Reply:
    """An answer, or how there is none. `pieces` are streamed one an event."""

    pieces: list[str] = field(default_factory=list)
    finish_reason: str = "stop"
    status: int = 200
    error: str = "refused"
    headers: dict[str, str] = field(default_factory=dict)
    hang_after: int | None = None
    """Send so many pieces, then nothing any more."""
    cut_after: int | None = None
    """Send so many pieces, then close the connection."""
    error_after: int | None = None
    """Send so many pieces, then an error event."""
    hold: threading.Event | None = None
    """Wait for it before the first piece."""
    first: float = 0.0
    gap: float = 0.0
    """Seconds before the first piece, and before each other."""
    cached: int = 0
    usage: bool = True
    raw: dict[str, Any] | None = None
    """The whole body of an answer that is not streamed."""


Script = Callable[[str, dict[str, Any]], Reply]


class FakeEndpoint:
    """`calls`: path and body of each request, in their order."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.headers: list[dict[str, str]] = []
        self.most_at_once = 0
        self._now = 0
        self.url = ""

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "toy", "object": "model"}]})

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        path = request.path.removeprefix("/v1/")
        self.calls.append((path, body))
        self.headers.append(dict(request.headers))
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        try:
            return await self._reply(request, path, body, self.script(path, body))
        finally:
            self._now -= 1

    async def _reply(self, request: web.Request, path: str, body: Any, reply: Reply) -> web.StreamResponse:
        if reply.hold is not None:
            assert await asyncio.to_thread(reply.hold.wait, 60)
        if reply.status != 200:
            return web.json_response(
                {"error": {"message": reply.error}}, status=reply.status, headers=reply.headers
            )
        if not body.get("stream"):
            return web.json_response(reply.raw or self._whole(path, reply))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)

        async def send(event: Any) -> None:
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")

        if path != "completions":
            await send({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        due = asyncio.get_running_loop().time() + reply.first
        for place, piece in enumerate([*reply.pieces, None]):
            if piece is not None:
                await asyncio.sleep(max(0.0, due - asyncio.get_running_loop().time()))
                due += reply.gap
            if place == reply.hang_after:
                await asyncio.sleep(3600)
            if place == reply.cut_after:
                assert request.transport is not None
                request.transport.close()
                return response
            if place == reply.error_after:
                await send({"error": {"message": "the engine died", "code": 500}})
                return response
            if piece is not None:
                one = {"text": piece} if path == "completions" else {"delta": {"content": piece}}
                await send({"choices": [{"index": 0, **one, "finish_reason": None}]})
        last: dict[str, Any] = {"text": ""} if path == "completions" else {"delta": {}}
        await send({"choices": [{"index": 0, **last, "finish_reason": reply.finish_reason}]})
        if reply.usage and (body.get("stream_options") or {}).get("include_usage"):
            await send({"choices": [], "usage": usage(body, reply)})
        await response.write(b"data: [DONE]\n\n")
        return response

    @staticmethod
    def _whole(path: str, reply: Reply) -> dict[str, Any]:
        text = "".join(reply.pieces)
        one = {"text": text} if path == "completions" else {"message": {"role": "assistant", "content": text}}
        return {"choices": [{"index": 0, **one, "finish_reason": reply.finish_reason}]}


def usage(body: dict[str, Any], reply: Reply) -> dict[str, Any]:
    return {
        "prompt_tokens": len(tokens_of(prompt_of(body))),
        "completion_tokens": len(reply.pieces),
        "prompt_tokens_details": {"cached_tokens": reply.cached},
    }


def prompt_of(body: dict[str, Any]) -> str:
    """The text that a body continues; a chat's in a template of one line a message."""
    if "prompt" in body:
        return str(body["prompt"])
    return "\n".join(f"{each['role']}: {each['content']}" for each in body["messages"])


def tokens_of(text: str) -> list[str]:
    return TOKEN.findall(text)


def offsets_of(tokens: list[str]) -> list[int]:
    return [sum(map(len, tokens[:place])) for place in range(len(tokens))]


@contextlib.contextmanager
def running_endpoint(script: Script) -> Iterator[FakeEndpoint]:
    """In a thread of its own, so that programs that block can be tested."""
    stand, ready, leave = FakeEndpoint(script), threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        app = web.Application(client_max_size=2**26)
        app.router.add_get("/v1/models", stand.models)
        app.router.add_post("/v1/completions", stand.answer)
        app.router.add_post("/v1/chat/completions", stand.answer)
        runner = web.AppRunner(app, shutdown_timeout=0.05)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        stand.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        await leave.wait()
        await runner.cleanup()

    def run() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(serve())

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(60)
    try:
        yield stand
    finally:
        loop.call_soon_threadsafe(leave.set)
        thread.join(60)
        assert not thread.is_alive()
