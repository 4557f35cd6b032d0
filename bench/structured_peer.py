"""Structured output over HTTP: Kvasir in one process and vLLM with its own, on one set of requests, in turn.

    python -m bench.structured_peer [--systems ...] [--rounds N]

The set is that of `bench.structured`: 16 answers of nested objects without free white space, temperature 0, all at
once and one after the other. Both servers are started first and frozen while the other has its turn; each sees all
schemas once before anything is measured. Every answer that is whole is validated. Prints the medians of the rounds.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import jsonschema
from bench import machine
from bench.serving import PEER, started
from bench.structured import BATCH, MOST_TOKENS, SCHEMAS
from bench.systems import NAME, SYSTEMS, Server
from rich.console import Console
from rich.table import Table

REQUESTS = [(name, number) for number in range(BATCH // len(SCHEMAS)) for name in SCHEMAS]


@dataclass(frozen=True)
class Turn:
    """One pass over the set."""

    seconds: float
    tokens: int
    whole: int


async def _answer(client: httpx.AsyncClient, name: str, number: int) -> tuple[int, bool]:
    """The tokens of one answer, and whether it ended by itself."""
    body: dict[str, Any] = {
        "model": NAME,
        "messages": [{"role": "user", "content": f"{number}: Describe some {name} as JSON."}],
        "max_tokens": MOST_TOKENS,
        "temperature": 0,
        "structured_outputs": {"json": SCHEMAS[name], "disable_any_whitespace": True},
    }
    response = await client.post("/v1/chat/completions", json=body)
    response.raise_for_status()
    told = response.json()
    (choice,) = told["choices"]
    whole = choice["finish_reason"] == "stop"
    if whole:
        jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMAS[name])
    return told["usage"]["completion_tokens"], whole


async def _turn(url: str, together: int) -> Turn:
    gate = asyncio.Semaphore(together)
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:

        async def ask(name: str, number: int) -> tuple[int, bool]:
            async with gate:
                return await _answer(client, name, number)

        began = time.perf_counter()
        found = await asyncio.gather(*(ask(*each) for each in REQUESTS))
        return Turn(time.perf_counter() - began, sum(each[0] for each in found), sum(each[1] for each in found))


def measured(servers: list[Server], rounds: int) -> dict[tuple[str, int], list[Turn]]:
    """All turns by system and how many requests there are at once."""
    found: dict[tuple[str, int], list[Turn]] = {}
    for number in range(rounds + 1):
        for together in (BATCH, 1):
            for server in servers:
                server.thaw()
                turn = asyncio.run(_turn(server.url, together))
                server.freeze()
                if number:  # the first is to warm up
                    found.setdefault((server.name, together), []).append(turn)
    return found


def table(found: dict[tuple[str, int], list[Turn]]) -> Table:
    """Medians, and ratios to the peer's."""
    shown = Table(title=f"{len(REQUESTS)} answers of nested objects, medians")
    for name in ("system", "at once", "whole", "tokens", "seconds", "tokens/s", "answers/s", f"to {PEER}"):
        shown.add_column(name)
    seconds = {key: statistics.median(turn.seconds for turn in turns) for key, turns in found.items()}
    for (name, together), turns in found.items():
        rate = statistics.median(turn.tokens / turn.seconds for turn in turns)
        answers = statistics.median(turn.whole / turn.seconds for turn in turns)
        peer = found.get((PEER, together))
        ratio = "" if peer is None else f"{rate / statistics.median(t.tokens / t.seconds for t in peer):.2f}"
        row = turns[0].whole, turns[0].tokens, f"{seconds[name, together]:.1f}", f"{rate:.1f}", f"{answers:.2f}"
        shown.add_row(name, str(together), *map(str, row), ratio)
    return shown


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=["colocated", PEER])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="kvasir-bench-"))
    with ExitStack() as stack:
        found = measured(started(arguments.systems, scratch, stack), arguments.rounds)
    if not found:
        raise SystemExit("no system could be measured")
    Console(width=120).print(table(found))
    print(machine.describe())


if __name__ == "__main__":
    main()
