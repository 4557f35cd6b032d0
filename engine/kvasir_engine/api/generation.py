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
    """One of the answers asked for. `prompt` says which of the request's prompts it continues; where it `shows_ids`
    its pieces have their tokens' ids. One that is `silent` ends with its first token, which is not its own."""

    index: int
    prompt: int
    request: GenerateRequest
    detokenizer: Detokenizer
    shows_ids: bool = False
    parser: ChoiceParser | None = None
    silent: bool = False


class Tally:
    """Token counts of one request, over all its choices."""

    def __init__(self, prompts: int) -> None:
        self.completion_tokens = 0
        self.reasoning_tokens = 0
        self._cached = [0] * prompts

    def cached(self, prompt: int, tokens: int) -> None:
        """`tokens` of a prompt came from a cache. Of several choices of one prompt, the best counts."""
        self._cached[prompt] = max(self._cached[prompt], tokens)

    @property
    def cached_tokens(self) -> int:
        return sum(self._cached)


class TokenClock:
    """Times the tokens of one request from its arrival, for the metrics where there are any."""

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
        """`tokens` came together, `since` after the ones before them."""
        if self._metrics is None:
            return
        self._metrics.itl.observe(since / tokens, tokens)


async def run_choice(
    client: EngineClient, choice: Choice, tally: Tally, clock: TokenClock
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
                tally.cached(choice.prompt, output.cached_tokens)
            if output.prompt_logprobs is not None:
                tokens = choice.request.tokens
                prompt = PromptReport(choice.detokenizer.vocabulary, tokens, output.prompt_logprobs)
            if choice.silent and output.tokens:
                output = Output([], None, "length", output.cached_tokens)
            for part in (output,) if choice.parser is None else _parts(output, choice.parser):
                piece = choice.detokenizer.push(part)
                tally.completion_tokens += piece.tokens
                if choice.shows_ids:
                    ids += part.tokens[: piece.tokens]
                if choice.parser is not None:
                    before = choice.parser.reasoning_tokens
                    piece = choice.parser.parse(piece)
                    tally.reasoning_tokens += choice.parser.reasoning_tokens - before
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


def _parts(output: Output, parser: ChoiceParser) -> Sequence[Output]:
    """An output for each token where it has to be known which of them are reasoning."""
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
    """The choices of one request, of which some wait until another has ended."""

    def __init__(self, running: int) -> None:
        self._running = running
        self._ended = 0
        self._change = asyncio.Condition()

    async def end(self) -> None:
        """One that ran has ended."""
        async with self._change:
            self._running -= 1
            self._ended += 1
            self._change.notify_all()

    async def wait(self) -> bool:
        """One that ran waits until another has ended, and runs again; False if there is none to wait for."""
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
    client: EngineClient, choices: Sequence[Choice], tally: Tally, clock: TokenClock
) -> AsyncGenerator[tuple[Choice, Piece], None]:
    """The pieces of all choices as they come, in order within one.

    One that fails ends with a piece that says so; when all have failed, the first one's error is raised. Those that
    the workers have no room for are asked for again when another has ended.
    """
    if len(choices) == 1:
        return run_choice(client, choices[0], tally, clock)
    return _run_several(client, choices, tally, clock)


async def _run_several(
    client: EngineClient, choices: Sequence[Choice], tally: Tally, clock: TokenClock
) -> AsyncGenerator[tuple[Choice, Piece], None]:
    merged: asyncio.Queue[tuple[Choice, Piece]] = asyncio.Queue()
    siblings = _Siblings(len(choices))

    async def forward(choice: Choice) -> None:
        while True:
            begun = False
            try:
                async with aclosing(run_choice(client, choice, tally, clock)) as pieces:
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
    """What comes, until all have ended. A failure waits for another's piece: it may be everyone's."""
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
