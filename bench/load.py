"""A load client for any OpenAI-compatible endpoint: five workloads, one JSON row each.

    python bench/load.py URL MODEL [WORKLOAD ...]

Runs alone, with httpx only. A workload and a seed always give the same prompts, so that figures of different days
and systems are of the same work.
"""

import asyncio
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import httpx

SEED = 7

WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem "
    "hand part place case week company system program question work government number night point home water room "
    "mother area money story fact month lot right study book eye job word business issue side kind head house "
    "service friend father power hour game line end member law car city community name president team minute idea "
    "kid body information back parent face others level office door health person art war history party result "
    "change morning reason research girl guy moment air teacher force education"
).split()


@dataclass(frozen=True)
class Talk:
    """What one client says, turn by turn; each prompt is all that was said and answered before it, and the turn."""

    turns: tuple[str, ...]
    max_tokens: int


@dataclass(frozen=True)
class Workload:
    """`streams` clients at a time work through the talks."""

    streams: int
    talks: tuple[Talk, ...]

    def begin(self) -> "Workload":
        """Enough of it to warm a server up: half of the first round, and of each talk two turns."""
        few = self.talks[: max(1, self.streams // 2)]
        return Workload(self.streams, tuple(Talk(talk.turns[:2], talk.max_tokens) for talk in few))


@dataclass(frozen=True)
class Row:
    """What a workload measured. Latencies in milliseconds; null where no stream got as far."""

    workload: str
    seconds: float
    out_tok_s: float
    in_tok_s: float
    ttft_p50: float | None
    ttft_p95: float | None
    itl_p50: float | None
    itl_p95: float | None
    errors: int
    err: str | None
    tokens_in: int
    tokens_out: int


@dataclass
class _Tally:
    ttft: list[float] = field(default_factory=list)  # seconds
    itl: list[float] = field(default_factory=list)
    tokens_in: int = 0
    tokens_out: int = 0
    errors: int = 0
    first_error: str | None = None

    def error(self, message: str) -> None:
        self.errors += 1
        self.first_error = self.first_error or message


def _text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def _single(rng: random.Random, seed: int) -> Workload:
    """One stream, bound by decoding."""
    return Workload(1, tuple(Talk((_text(rng, 60),), 128) for _ in range(3)))


def _unique(rng: random.Random, seed: int) -> Workload:
    """Many streams that have nothing in common."""
    return Workload(16, tuple(Talk((_text(rng, 128),), 64) for _ in range(48)))


def _shared(rng: random.Random, seed: int) -> Workload:
    """One long system prompt, many questions."""
    prompt = _text(rng, 1500)
    return Workload(8, tuple(Talk((prompt + " " + _text(rng, 32),), 32) for _ in range(40)))


def _multiturn(rng: random.Random, seed: int) -> Workload:
    """Conversations that grow."""
    prompt = "S" + _text(random.Random(seed), 400)

    def talk(rng: random.Random) -> Talk:
        questions = [" Q: " + _text(rng, 30) + " A:" for _ in range(5)]
        return Talk((prompt + questions[0], *questions[1:]), 32)

    return Workload(4, tuple(talk(random.Random(rng.random())) for _ in range(8)))


def _long(rng: random.Random, seed: int) -> Workload:
    """Long prompts, bound by prefill."""
    return Workload(2, tuple(Talk((_text(rng, 2500),), 4) for _ in range(6)))


_MAKERS: dict[str, Callable[[random.Random, int], Workload]] = {
    "single": _single,
    "unique": _unique,
    "shared": _shared,
    "multiturn": _multiturn,
    "long": _long,
}
WORKLOADS = tuple(_MAKERS)


def workload(name: str, seed: int = SEED) -> Workload:
    """The prompts of `name`, one of `WORKLOADS`; two seeds' prompts have no long prefix in common."""
    return _MAKERS[name](random.Random(seed), seed)


async def measure(url: str, model: str, name: str, work: Workload) -> Row:
    """Put `work` on the server at `url`, greedy and to the last token asked for."""
    tally = _Tally()
    free = asyncio.Semaphore(work.streams)

    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None)) as client:

        async def run(talk: Talk) -> None:
            async with free:
                said = ""
                for turn in talk.turns:
                    said += turn
                    try:
                        said += await _complete(client, url, model, said, talk.max_tokens, tally)
                    except httpx.HTTPError as error:
                        tally.error(repr(error))

        began = time.perf_counter()
        await asyncio.gather(*map(run, work.talks))
        seconds = time.perf_counter() - began
    return Row(
        workload=name,
        seconds=round(seconds, 2),
        out_tok_s=round(tally.tokens_out / seconds, 1),
        in_tok_s=round(tally.tokens_in / seconds, 1),
        ttft_p50=_quantile(tally.ttft, 0.5),
        ttft_p95=_quantile(tally.ttft, 0.95),
        itl_p50=_quantile(tally.itl, 0.5),
        itl_p95=_quantile(tally.itl, 0.95),
        errors=tally.errors,
        err=tally.first_error,
        tokens_in=tally.tokens_in,
        tokens_out=tally.tokens_out,
    )


async def _complete(
    client: httpx.AsyncClient, url: str, model: str, prompt: str, max_tokens: int, tally: _Tally
) -> str:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }
    began = last = time.perf_counter()
    pieces: list[str] = []
    async with client.stream("POST", url + "/v1/completions", json=body) as response:
        if response.status_code != 200:
            tally.error((await response.aread())[:200].decode(errors="replace"))
            return ""
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line[6:])
            if usage := chunk.get("usage"):
                tally.tokens_in += usage["prompt_tokens"]
                tally.tokens_out += usage["completion_tokens"]
            choices = chunk.get("choices")
            if choices and choices[0].get("text") is not None:
                now = time.perf_counter()
                (tally.itl if pieces else tally.ttft).append(now - last if pieces else now - began)
                last = now
                pieces.append(choices[0]["text"])
    return "".join(pieces)


def _quantile(values: Sequence[float], share: float) -> float | None:
    if not values:
        return None
    return round(1e3 * sorted(values)[min(len(values) - 1, int(share * len(values)))], 1)


def main(arguments: Sequence[str]) -> None:
    """See the module's docstring."""
    if len(arguments) < 2 or any(name not in WORKLOADS for name in arguments[2:]):
        raise SystemExit(f"usage: load.py URL MODEL [{'|'.join(WORKLOADS)} ...]")
    url, model, *names = arguments
    for name in names or WORKLOADS:
        row = asyncio.run(measure(url.rstrip("/"), model, name, workload(name)))
        print(json.dumps(asdict(row)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
