"""Puts one load on an endpoint, and measures each request."""

import asyncio
import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from kvasir_engine.client.bench.arrivals import arrival_times
from kvasir_engine.client.bench.datasets import Conversation, Count
from kvasir_engine.client.bench.measured import Point, RequestRecord, point_of
from kvasir_engine.client.connection import CallError, EndpointConnection

Api = Literal["completions", "chat"]
IN_A_ROW, SLOW_IN_A_ROW = 32, 4
"""After so many failures, or endless waits, without an answer between them, no more is sent; at a higher
concurrency, twice as many.
"""


@dataclass(frozen=True)
class LoadOptions:
    """One load. `concurrency`: most conversations at once; `duration`: seconds after which none begins."""

    model: str
    api: Api = "completions"
    request_rate: float = math.inf
    burstiness: float = 1.0
    concurrency: int | None = None
    duration: float | None = None
    seed: int = 0
    body: Mapping[str, Any] = field(default_factory=dict)
    limits: Mapping[str, float] = field(default_factory=dict)


class LoadRun:
    """Runs a load once. `on_record_end` is called with the record of each request that has ended."""

    def __init__(
        self,
        connection: EndpointConnection,
        options: LoadOptions,
        count: Count | None = None,
        on_record_end: Callable[[RequestRecord], None] = lambda record: None,
    ) -> None:
        self._connection, self._options, self._count, self._on_record_end = (
            connection,
            options,
            count,
            on_record_end,
        )
        self.records: list[RequestRecord] = []
        self._failed_in_a_row = self._slow_in_a_row = self._now = self._most = self._skipped = 0
        at_once = 2 * (options.concurrency or 0)
        self._patience, self._slow_patience = max(IN_A_ROW, at_once), max(SLOW_IN_A_ROW, at_once)

    async def run(self, conversations: Sequence[Conversation]) -> Point:
        """Run each conversation at its time, to its end."""
        options = self._options
        free = asyncio.Semaphore(options.concurrency) if options.concurrency else None
        arrivals = arrival_times(options.request_rate, options.burstiness, options.seed)
        with _rare_collection():
            began, cpu = time.perf_counter(), time.process_time()
            async with asyncio.TaskGroup() as group:
                for place, (conversation, at) in enumerate(zip(conversations, arrivals, strict=False)):
                    late = began + at - time.perf_counter()
                    if late > 0:
                        await asyncio.sleep(late)
                    if free is not None:
                        await free.acquire()
                    if self._over(began):
                        self._skipped += sum(len(each.turns) for each in conversations[place:])
                        break
                    group.create_task(self._converse(conversation, free))
            seconds = time.perf_counter() - began
            cpu = time.process_time() - cpu
        return point_of(
            self.records,
            seconds,
            options.limits,
            (options.request_rate, options.concurrency),
            self._skipped,
            self._most,
            cpu / seconds if seconds else 0.0,
        )

    def _over(self, began: float) -> bool:
        duration = self._options.duration
        dead = self._failed_in_a_row >= self._patience or self._slow_in_a_row >= self._slow_patience
        return dead or (duration is not None and time.perf_counter() - began >= duration)

    async def _converse(self, conversation: Conversation, free: asyncio.Semaphore | None) -> None:
        try:
            said: list[str] = []
            for place, turn in enumerate(conversation.turns):
                said.append(turn.text)
                record = RequestRecord()
                self._now += 1
                self._most = max(self._most, self._now)
                try:
                    await self._request(said, turn.max_tokens, record)
                finally:
                    self._now -= 1
                self.records.append(record)
                self._failed_in_a_row = self._failed_in_a_row + 1 if record.error else 0
                slow = record.error in ("idle", "timeout")
                self._slow_in_a_row = self._slow_in_a_row + slow if record.error else 0
                self._on_record_end(record)
                if record.error:
                    self._skipped += len(conversation.turns) - place - 1
                    break
                said.append(record.text)
        finally:
            if free is not None:
                free.release()

    async def _request(self, said: Sequence[str], max_tokens: int, record: RequestRecord) -> None:
        options = self._options
        body = {
            "model": options.model,
            "max_tokens": max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            **_prompt(options.api, said),
            **options.body,
        }
        path = "completions" if options.api == "completions" else "chat/completions"
        pieces: list[str] = []
        usage = None
        record.sent = last = time.perf_counter()
        try:
            async with contextlib.aclosing(self._connection.stream(path, body)) as events:
                async for event in events:
                    usage = event.usage or usage
                    if event.choices:
                        now = time.perf_counter()
                        choice = event.choices[0]
                        if choice.generated:
                            if record.ttft is None:
                                record.ttft = now - record.sent
                            else:
                                record.itl.append(now - last)
                            last = now
                            pieces.append(choice.content)
                        record.e2el = now - record.sent
        except CallError as error:
            record.error, record.message = error.kind, str(error)
        record.text = "".join(pieces)
        if usage is not None:
            record.prompt_tokens, record.cached_tokens = usage.prompt_tokens, usage.cached
            record.output_tokens = usage.completion_tokens or 0
        elif self._count is not None:
            record.prompt_tokens = self._count(_text_of(options.api, said))
            record.output_tokens = self._count(record.text) if record.text else 0
        elif not record.error:
            record.error = "no_usage"
            record.message = "the endpoint sends no usage; give a --tokenizer that counts the tokens"


def _prompt(api: Api, said: Sequence[str]) -> dict[str, Any]:
    if api == "completions":
        return {"prompt": _text_of(api, said)}
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[place % 2], "content": text} for place, text in enumerate(said)]}


def _text_of(api: Api, said: Sequence[str]) -> str:
    """The messages as one text; a question begins after a space."""
    if api == "chat":
        return "\n".join(said)
    return "".join(f" {text}" if place and place % 2 == 0 else text for place, text in enumerate(said))


@contextlib.contextmanager
def _rare_collection() -> Iterator[None]:
    """Freeze existing objects and collect garbage rarely: pauses would be measured as the endpoint's."""
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 50, 1_000)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


async def warm_up(
    connection: EndpointConnection, options: LoadOptions, conversations: Sequence[Conversation], count: Count | None
) -> RequestRecord | None:
    """Run some conversations before the measurement, two at once; returns the first that failed."""
    quiet = LoadOptions(options.model, options.api, concurrency=2, body=options.body)
    run = LoadRun(connection, quiet, count)
    await run.run(conversations)
    return next((each for each in run.records if each.error), None)
