"""Streams completions of ShareGPT-like lengths at a server.

    python -m bench.gpu.http_load URL MODEL REQUESTS STREAMS PROCESSES

Prints one line of JSON.
"""

import asyncio
import json
import math
import multiprocessing
import random
import sys
import time
from dataclasses import dataclass
from typing import Any

import httpx

LETTERS = "abcdefghijklmnop qrstuvwxyz"


@dataclass(frozen=True)
class Answer:
    """Seconds from asking to the first event, and to the last; `tokens` as the server counts them."""

    first: float
    last: float
    tokens: int
    events: int


def body(model: str, rng: random.Random) -> dict[str, Any]:
    """A completion with skewed lengths: about 220 tokens in and 180 out."""

    def length(middle: int, least: int) -> int:
        return max(least, min(1000, int(math.exp(rng.gauss(0, 0.9)) * middle)))

    prompt, out = "".join(rng.choices(LETTERS, k=length(147, 8))), length(120, 4)
    asked = {"model": model, "prompt": prompt, "max_tokens": out, "temperature": 0, "stream": True}
    return asked | {"stream_options": {"include_usage": True}}


async def ask(client: httpx.AsyncClient, request: dict[str, Any]) -> Answer | str:
    """The answer, or what went wrong."""
    began, first, last, tokens, events = time.perf_counter(), None, 0.0, 0, 0
    async with client.stream("POST", "/v1/completions", json=request) as response:
        if response.status_code != 200:
            return f"{response.status_code} {(await response.aread())[:200]!r}"
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event, last, events = json.loads(line[6:]), time.perf_counter() - began, events + 1
            first = last if first is None and event.get("choices") else first
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    return "no token came" if first is None else Answer(first, last, tokens, events)


def work(url: str, model: str, requests: int, streams: int, seed: int) -> list[Answer | str]:
    """One process's part."""

    async def run() -> list[Answer | str]:
        rng, limit = random.Random(seed), asyncio.Semaphore(streams)
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:

            async def one(request: dict[str, Any]) -> Answer | str:
                async with limit:
                    return await ask(client, request)

            return await asyncio.gather(*(one(body(model, rng)) for _ in range(requests)))

    return asyncio.run(run())


def summary(answers: list[Answer | str], wall: float) -> dict[str, Any]:
    right, wrong = [a for a in answers if isinstance(a, Answer)], [a for a in answers if isinstance(a, str)]
    found: dict[str, Any] = {"requests": len(right), "errors": len(wrong), "error": wrong[:2], "seconds": wall}
    if right:
        firsts = sorted(a.first for a in right)
        gaps = sorted((a.last - a.first) / max(1, a.tokens - 1) for a in right)
        found |= {
            "tokens_per_second": sum(a.tokens for a in right) / wall,
            "ttft_p50_ms": firsts[len(firsts) // 2] * 1e3,
            "ttft_p99_ms": firsts[len(firsts) * 99 // 100] * 1e3,
            "itl_p50_ms": gaps[len(gaps) // 2] * 1e3,
            "events": sum(a.events for a in right),
        }
    return found


def main(url: str, model: str, requests: int, streams: int, processes: int) -> None:
    began = time.perf_counter()
    parts = [(url, model, requests // processes, max(1, streams // processes), seed) for seed in range(processes)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        answers = [answer for part in pool.starmap(work, parts) for answer in part]
    print(json.dumps(summary(answers, time.perf_counter() - began)))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6]))
