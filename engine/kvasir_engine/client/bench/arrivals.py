"""When requests are sent. Pure."""

import math
import random
from collections.abc import Iterator


def arrival_times(rate: float, burstiness: float, seed: int) -> Iterator[float]:
    """Seconds from the start, without end: gaps of a gamma distribution with the mean 1 / `rate`.

    A `burstiness` of 1 is a Poisson process; below 1 requests come in bursts, above it more evenly. An infinite
    rate is all at once.
    """
    chance, now = random.Random(seed), 0.0
    while True:
        yield now
        if not math.isinf(rate):
            now += chance.gammavariate(burstiness, 1 / (rate * burstiness))
