"""Runs the choices of one request on the engine and turns their tokens into text."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import msgspec

from kvasir_engine.api.detokenizer import Detokenizer, Piece
from kvasir_engine.api.metrics import ApiMetrics
from kvasir_engine.api.prompt_report import PromptReport
from kvasir_engine.api.tools.choice import ChoiceParser
from kvasir_engine.engine_client import EngineClient, EngineError, GenerateRequest, Output


@dataclass(frozen=True)
class Choice:
    """One of a request's answers. `prompt` is the index of the prompt that it continues; with `shows_ids` its
    pieces have token ids. A `silent` choice ends with its first token, which is not shown.
    """

    index: int
    prompt: int
    request: GenerateRequest
    detokenizer: Detokenizer
    shows_ids: bool = False
    parser: ChoiceParser | None = None
    silent: bool = False


class UsageCounter:
    """Token counts of one request, over all its choices."""

    def __init__(self, prompts: int) -> None:
        self.completion_tokens = 0
        self.reasoning_tokens = 0
        self._cached = [0] * prompts

    def cached(self, prompt: int, tokens: int) -> None:
        """Note that `tokens` of a prompt came from a cache. Of several choices of one prompt, the
        largest counts.
        """
        self._cached[prompt] = max(self._cached[prompt], tokens)

    @property
    def cached_tokens(self) -> int:
        return sum(self._cached)


class TokenClock:
    """Times the tokens of one request from its arrival, for the metrics if there are any."""

    def __init__(self, metrics: ApiMetrics | None) -> None:
        self._metrics = metrics
        self._arrival = time.perf_counter()
        self._first = True

    def first(self) -> None:
        if self._first:
            self._first = False
            if self._metrics is not None:
                self._metrics.ttft.observe(time.perf_counter() - self._arrival)

    def next(self, since: float, tokens: int) -> None:
        """Note that `tokens` came together, `since` after the previous ones."""
        if self._metrics is None:
            return
        self._metrics.itl.observe(since / tokens, tokens)


async def run_choice(
    client: EngineClient, choice: Choice, counter: UsageCounter, clock: TokenClock
) -> AsyncGenerator[tuple[Choice, Piece], None]:
    """The pieces of one choice, each with text, logprobs or the finish reason. Raises EngineError.

    Ends the engine's work when it is closed, and when a stop string ends the answer before the engine does.
    """
    last: float | None = None
    ids: list[int] = []
    prompt: PromptReport | None = None
    async with aclosing(client.generate(choice.request)) as outputs:
        async for output in outputs:
            now = time.perf_counter()
            if output.tokens:
                if last is None:
                    clock.first()
                else:
                    clock.next(now - last, len(output.tokens))
                last = now
            if output.cached_tokens > 0:
                counter.cached(choice.prompt, output.cached_tokens)
            if output.prompt_logprobs is not None:
                tokens = choice.request.tokens
                prompt = PromptReport(choice.detokenizer.vocabulary, tokens, output.prompt_logprobs)
            if choice.silent and output.tokens:
                output = Output([], None, "length", output.cached_tokens)
            for part in (output,) if choice.parser is None else _parts(output, choice.parser):
                piece = choice.detokenizer.push(part)
                counter.completion_tokens += piece.tokens
                if choice.shows_ids:
                    ids += part.tokens[: piece.tokens]
                if choice.parser is not None:
                    before = choice.parser.reasoning_tokens
                    piece = choice.parser.parse(piece)
                    counter.reasoning_tokens += choice.parser.reasoning_tokens - before
                if piece.text or piece.deltas or piece.scored or piece.finish_reason:
                    if ids:
                        piece = msgspec.structs.replace(piece, ids=tuple(ids))
                        ids.clear()
                    if prompt is not None:
                        piece = msgspec.structs.replace(piece, prompt=prompt)
                        prompt = None
                    yield choice, piece
                if piece.finish_reason:
                    return
    raise EngineError("unfinished", "the engine ended the answer and did not say why")


def _parts(output: Output, parser: ChoiceParser) -> Sequence[Output]:
    """The engine's outputs, split into one for each token where reasoning tokens must be counted."""
    if len(output.tokens) < 2 or not parser.may_reason:
        return (output,)
    last = len(output.tokens) - 1
    return [
        Output(
            [token],
            None if output.logprobs is None else [output.logprobs[place]],
            output.finish_reason if place == last else None,
            output.cached_tokens,
        )
        for place, token in enumerate(output.tokens)
    ]


class _Siblings:
    """The choices of one request; some of them wait until another has ended."""

    def __init__(self, running: int) -> None:
        self._running = running
        self._ended = 0
        self._change = asyncio.Condition()

    async def end(self) -> None:
        """Note that a running choice has ended."""
        async with self._change:
            self._running -= 1
            self._ended += 1
            self._change.notify_all()

    async def wait(self) -> bool:
        """Wait until another choice has ended, and run again; False if there is none to wait for."""
        async with self._change:
            if self._running == 1:
                return False
            self._running -= 1
            ended = self._ended
            try:
                await self._change.wait_for(lambda: self._ended > ended)
            finally:
                self._running += 1
            return True


def run_choices(
    client: EngineClient, choices: Sequence[Choice], counter: UsageCounter, clock: TokenClock
) -> AsyncGenerator[tuple[Choice, Piece], None]:
    """The pieces of all choices as they come, in order within one.

    A failed choice ends with a piece that has the error; when all have failed, the first error is raised. Choices
    that the workers refuse for want of room are retried when another has ended.
    """
    if len(choices) == 1:
        return run_choice(client, choices[0], counter, clock)
    return _run_several(client, choices, counter, clock)


async def _run_several(
    client: EngineClient, choices: Sequence[Choice], counter: UsageCounter, clock: TokenClock
) -> AsyncGenerator[tuple[Choice, Piece], None]:
    merged: asyncio.Queue[tuple[Choice, Piece]] = asyncio.Queue()
    siblings = _Siblings(len(choices))

    async def forward(choice: Choice) -> None:
        while True:
            begun = False
            try:
                async with aclosing(run_choice(client, choice, counter, clock)) as pieces:
                    async for piece in pieces:
                        begun = True
                        merged.put_nowait(piece)
            except Exception as error:  # the reader below says so
                full = isinstance(error, EngineError) and error.code == "overloaded"
                if full and not begun and await siblings.wait():
                    continue
                merged.put_nowait((choice, Piece("", 0, [], "error", error)))
            await siblings.end()
            return

    tasks = [asyncio.create_task(forward(choice)) for choice in choices]
    try:
        async with aclosing(_failures_last(merged, len(choices))) as pieces:
            async for piece in pieces:
                yield piece
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _failures_last(
    merged: asyncio.Queue[tuple[Choice, Piece]], running: int
) -> AsyncGenerator[tuple[Choice, Piece], None]:
    """The pieces of all choices until all have ended. A failure waits for a piece of another choice, since all may
    fail.
    """
    failed: list[tuple[Choice, Piece]] = []
    choices, failures, begun = running, 0, False
    first: Exception | None = None
    while running:
        item = await merged.get()
        piece = item[1]
        running -= piece.finish_reason is not None
        if piece.failure is not None:
            failures += 1
            first = first or piece.failure
            failed.append(item)
        else:
            begun = True
            yield item
        if failures == choices and first is not None:
            raise first
        if begun:
            for each in failed:
                yield each
            failed.clear()


async def text_of(pieces: AsyncIterator[tuple[Choice, Piece]], choices: int) -> list[list[Piece]]:
    """All pieces of each choice, by its index."""
    collected: list[list[Piece]] = [[] for _ in range(choices)]
    async for choice, piece in pieces:
        collected[choice.index].append(piece)
    return collected
