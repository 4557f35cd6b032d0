"""The measurements of one request, and of many together. Pure."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

METRICS = ("ttft", "tpot", "itl", "e2el")
"""Time to the first token, time per token after it, time between two events with tokens, and end to end."""
PERCENTILES = (50, 90, 95, 99)


@dataclass
class RequestRecord:
    """One request; times in seconds. `error` is its kind, empty where it was answered whole."""

    sent: float = 0.0
    ttft: float | None = None
    itl: list[float] = field(default_factory=list)
    e2el: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    text: str = ""
    error: str = ""
    message: str = ""

    @property
    def tpot(self) -> float | None:
        """Time per token after the first."""
        if self.ttft is None or self.output_tokens < 2:
            return None
        return (self.e2el - self.ttft) / (self.output_tokens - 1)

    def meets(self, limits: Mapping[str, float]) -> bool:
        """Whether it was answered, and no time exceeds its limit, in seconds."""
        times = {"ttft": self.ttft, "tpot": self.tpot, "e2el": self.e2el}
        times["itl"] = max(self.itl, default=None)
        return not self.error and all((times[name] or 0.0) <= limit for name, limit in limits.items())


@dataclass(frozen=True)
class Spread:
    """The statistics of one metric, in milliseconds; None where nothing was measured."""

    mean: float | None
    percentiles: dict[int, float | None]


@dataclass(frozen=True)
class Point:
    """One load and its results. `goodput`: requests a second within their limits, None without limits.

    `client_cpu`: this program's share of one core; near 1, the client is the bottleneck.
    """

    request_rate: float
    concurrency: int | None
    seconds: float
    completed: int
    errors: dict[str, int]
    messages: dict[str, str]
    not_sent: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    most_at_once: int
    spreads: dict[str, Spread]
    goodput: float | None
    client_cpu: float

    def a_second(self, number: float) -> float:
        """`number` divided by the run's seconds."""
        return number / self.seconds if self.seconds else 0.0


def percentile(ordered: Sequence[float], percent: float) -> float | None:
    """Interpolated between the two nearest of the sorted values, as numpy does; None if there are none."""
    if not ordered:
        return None
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread(seconds: Sequence[float]) -> Spread:
    """The statistics of times in seconds."""
    ordered = sorted(seconds)
    found = {percent: percentile(ordered, percent) for percent in PERCENTILES}
    mean = sum(ordered) / len(ordered) if ordered else None
    return Spread(_ms(mean), {percent: _ms(value) for percent, value in found.items()})


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def point_of(
    records: Sequence[RequestRecord],
    seconds: float,
    limits: Mapping[str, float],
    load: tuple[float, int | None],
    not_sent: int,
    most_at_once: int,
    client_cpu: float,
) -> Point:
    """The results of one load's requests. Latencies are those of answered requests."""
    done = [each for each in records if not each.error]
    failed = [each for each in records if each.error]
    times = {
        "ttft": [each.ttft for each in done if each.ttft is not None],
        "tpot": [each.tpot for each in done if each.tpot is not None],
        "itl": [gap for each in done for gap in each.itl],
        "e2el": [each.e2el for each in done],
    }
    good = sum(each.meets(limits) for each in done)
    return Point(
        request_rate=load[0],
        concurrency=load[1],
        seconds=seconds,
        completed=len(done),
        errors=dict(Counter(each.error for each in failed)),
        messages={each.error: each.message for each in reversed(failed)},
        not_sent=not_sent,
        prompt_tokens=sum(each.prompt_tokens for each in done),
        cached_tokens=sum(each.cached_tokens for each in done),
        output_tokens=sum(each.output_tokens for each in done),
        most_at_once=most_at_once,
        spreads={name: spread(times[name]) for name in METRICS},
        goodput=(good / seconds if seconds else 0.0) if limits else None,
        client_cpu=client_cpu,
    )
