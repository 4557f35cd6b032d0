"""The engine of this process as an EngineClient, for the OpenAI API of `kvasir serve`."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator

from kvasir_engine.core.engine_thread import EngineThread
from kvasir_engine.delta_inbox import DeltaInbox
from kvasir_engine.engine_client import EngineError, GenerateRequest, Output
from kvasir_engine.protocol import Delta, Failure, Step, Submit, ToRouter
from kvasir_engine.scored_prompt import ScoredPrompt

STATUS = {
    "bad_request": 400,
    "context_length_exceeded": 400,
    "no_token_allowed": 400,
    "overloaded": 503,
    "engine_gone": 503,
}


class InProcessClient:
    """A session of the engine's thread. Create it and use it on one event loop."""

    def __init__(self, thread: EngineThread) -> None:
        self._thread = thread
        self._loop = asyncio.get_running_loop()
        self._streams: dict[str, DeltaInbox[None, Delta]] = {}
        self._ids = itertools.count(1)
        self._over: str | None = None
        self._session = thread.attach(self._sink, self._ended)

    @property
    def max_length(self) -> int:
        """The most tokens of a sequence."""
        return self._thread.engine.max_length

    def unready_reason(self) -> str | None:
        """Why no request can be served now, or `None`."""
        return self._thread.unhealthy_reason()

    async def wait_ready(self) -> str | None:
        """See EngineClient. An unhealthy engine does not recover."""
        return self.unready_reason()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Output, None]:
        """See EngineClient."""
        request_id = f"{next(self._ids)}-{request.id}"
        if self._over is not None:
            raise EngineError("engine_gone", self._over, 503)
        deltas: DeltaInbox[None, Delta] = DeltaInbox()
        self._streams[request_id] = deltas
        submit = Submit(request_id, request.tokens, request.sampling, request.salt, priority=request.priority)
        self._thread.post(lambda engine: engine.submit(self._session, submit))
        prompt = ScoredPrompt(len(request.tokens), request.sampling)
        try:
            while True:
                _, delta = await deltas.get()
                if delta.failure is not None:
                    code = delta.failure.code
                    raise EngineError(code, delta.failure.message, STATUS.get(code, 500))
                if delta.prompt_logprobs:
                    if (wrong := prompt.take(delta)) is not None:
                        raise EngineError("bad_frame", f"the engine sent {wrong}")
                    continue
                if not prompt.complete:
                    raise EngineError("bad_frame", "the engine sent a token before all prompt_logprobs")
                finish = delta.finish
                scores = prompt.report() if delta.tokens else None
                yield Output(delta.tokens, delta.logprobs, finish, delta.cached, scores)
                if finish is not None:
                    return
        finally:
            del self._streams[request_id]
            self._thread.post(lambda engine: engine.abort(self._session, request_id))

    def _sink(self, frames: list[ToRouter]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server is going down
            self._loop.call_soon_threadsafe(self._dispatch, frames)

    def _ended(self, reason: str) -> None:
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._end_all, reason)

    def _end_all(self, reason: str) -> None:
        """End all streams, as the engine is gone."""
        self._over = reason
        for id, stream in self._streams.items():
            stream.put(None, Delta(id, failure=Failure("engine_gone", reason)))

    def _dispatch(self, frames: list[ToRouter]) -> None:
        for frame in frames:
            if isinstance(frame, Step):
                for delta in frame.deltas:
                    stream = self._streams.get(delta.id)
                    if stream is not None:
                        stream.put(None, delta)
