"""What the schedule and the radix tree cost a step, without a model.

    python -m bench.scheduler

Prints medians in microseconds: planning a step of 256 requests in several states, and matching in a tree of a
million tokens. The target is under 2% of an H100's decode step of Llama-3.1-8B at that batch, that is 200 us.
"""

import random
import statistics
import time
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from kvasir_engine.core.kv_cache_manager import KVCacheManager
from kvasir_engine.core.scheduler import Limits, schedule
from kvasir_engine.core.sequence import Sequence
from kvasir_engine.protocol import Sampling

PAGE = 16
REQUESTS = 256
SAMPLING = Sampling(max_tokens=10_000)


def median_us(function: Callable[[], object], times: int = 300) -> float:
    """The median of `times` calls."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        function()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken) * 1e6


def prompt(rng: random.Random, length: int) -> list[int]:
    """Tokens of a vocabulary like Llama 3's."""
    return [rng.randrange(128_000) for _ in range(length)]


def running(cache: KVCacheManager, rng: random.Random, arrival: int, length: int) -> Sequence:
    """A sequence that decodes at a length."""
    sequence = Sequence(f"r{arrival}", prompt(rng, length), SAMPLING, arrival)
    cache.admit(sequence)
    sequence.computed = length - 1
    return sequence


def rows() -> list[tuple[str, float]]:
    """What is measured, and its median in microseconds."""
    rng = random.Random(7)
    cache = KVCacheManager(200_000, PAGE, lambda source, target: None)
    limits = Limits(2048, REQUESTS, PAGE)
    decoding = [running(cache, rng, i, rng.randrange(400, 1600)) for i in range(REQUESTS)]
    found = [("plan: 256 decode", median_us(lambda: schedule(decoding, [], cache, limits)))]

    fewer = decoding[: REQUESTS - 8]
    waiting = [Sequence(f"w{i}", prompt(rng, 2048), SAMPLING, 1000 + i) for i in range(512)]
    planned = median_us(lambda: schedule(fewer, waiting, cache, limits))
    found.append(("plan: 248 decode, 512 wait for 2,048 tokens each", planned))

    leader = Sequence("leader", prompt(rng, 8192), SAMPLING, 999)
    cache.admit(leader)
    leader.computed = 7168
    followers = [Sequence(f"f{i}", leader.tokens + prompt(rng, 64), SAMPLING, 2000 + i) for i in range(512)]
    cache.share(leader)
    state = [*fewer[1:], leader]
    began = time.perf_counter()
    for sequence, ahead, shared in schedule(state, followers, cache, limits).follow:
        sequence.leader, sequence.shared = ahead, shared
    found.append(("plan: 512 come that follow a prompt under way", (time.perf_counter() - began) * 1e6))
    planned = median_us(lambda: schedule(state, followers, cache, limits))
    found.append(("plan: 247 decode, 512 follow a prompt under way", planned))

    big = KVCacheManager(80_000, PAGE, lambda source, target: None)
    prompts = [prompt(rng, 4096) for _ in range(245)]
    for i, tokens in enumerate(prompts):
        sequence = Sequence(f"t{i}", tokens, SAMPLING, i)
        big.admit(sequence)
        sequence.computed = len(tokens)
        big.tree.release(big.part(sequence, keep=True))
    tokens = prompts[100] + prompt(rng, 64)
    found.append((f"match: 4,096 tokens of {len(big.tree) * PAGE:,}", median_us(lambda: big.tree.match(tokens))))
    return found


def main() -> None:
    """See the module's docstring."""
    table = Table("what", "us")
    table.columns[1].justify = "right"
    for name, microseconds in rows():
        table.add_row(name, f"{microseconds:,.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
