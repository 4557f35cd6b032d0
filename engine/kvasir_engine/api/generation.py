"""Runs the choices of one request on the engine and turns their tokens into text."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from kvasir_engine.api.detokenizer import Detokenizer, Piece
from kvasir_engine.api.metrics import ApiMetrics
from kvasir_engine.client import EngineClient, GenerateRequest


@dataclass(frozen=True)
class Choice:
    """One of the answers asked for. `prompt` says which of the request's prompts it continues."""

    index: int
    prompt: int
    request: GenerateRequest
    detokenizer: Detokenizer


class Tally:
    """Token counts of one request, over all its choices."""

    def __init__(self, prompts: int) -> None:
        self.completion_tokens = 0
        self._cached = [0] * prompts

    def cached(self, prompt: int, tokens: int) -> None:
        """`tokens` of a prompt came from a cache. Of several choices of one prompt, the best counts."""
        self._cached[prompt] = max(self._cached[prompt], tokens)

    @property
    def cached_tokens(self) -> int:
        return sum(self._cached)


class TokenClock:
    """Times the tokens of one request from its arrival, for the metrics."""

    def __init__(self, metrics: ApiMetrics) -> None:
        self._metrics = metrics
        self._arrival = time.perf_counter()
        self._first = True

    def first(self) -> None:
        if self._first:
            self._first = False
            self._metrics.ttft.observe(time.perf_counter() - self._arrival)

    def next(self, since: float, tokens: int) -> None:
        """`tokens` came together, `since` after the ones before them."""
        each = since / tokens
        for _ in range(tokens):
            self._metrics.itl.observe(each)


async def run_choice(
    client: EngineClient, choice: Choice, tally: Tally, clock: TokenClock
) -> AsyncGenerator[tuple[Choice, Piece], None]:
    """The pieces of one choice, each with text, logprobs or the finish reason. Raises EngineError.

    Ends the engine's work when it is closed, and when a stop string ends the answer before the engine does.
    """
    last: float | None = None
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
            piece = choice.detokenizer.push(output)
            tally.completion_tokens += piece.tokens
            if piece.text or piece.scored or piece.finish_reason:
                yield choice, piece
            if piece.finish_reason:
                return


async def run_choices(
    client: EngineClient, choices: Sequence[Choice], tally: Tally, clock: TokenClock
) -> AsyncGenerator[tuple[Choice, Piece], None]:
    """The pieces of all choices as they come, in order within one. Raises the EngineError of the first to fail."""
    if len(choices) == 1:
        async with aclosing(run_choice(client, choices[0], tally, clock)) as pieces:
            async for piece in pieces:
                yield piece
        return
    merged: asyncio.Queue[tuple[Choice, Piece] | Exception | None] = asyncio.Queue()

    async def forward(choice: Choice) -> None:
        try:
            async with aclosing(run_choice(client, choice, tally, clock)) as pieces:
                async for piece in pieces:
                    merged.put_nowait(piece)
        except Exception as error:  # reraised by the reader below
            merged.put_nowait(error)
        else:
            merged.put_nowait(None)

    tasks = [asyncio.create_task(forward(choice)) for choice in choices]
    try:
        running = len(tasks)
        while running:
            item = await merged.get()
            if item is None:
                running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def text_of(pieces: AsyncIterator[tuple[Choice, Piece]], choices: int) -> list[list[Piece]]:
    """All pieces of each choice, by its index."""
    collected: list[list[Piece]] = [[] for _ in range(choices)]
    async for choice, piece in pieces:
        collected[choice.index].append(piece)
    return collected
