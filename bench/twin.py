"""A discrete-event model of a prefill and a decode pool under a trace of requests, for comparing autoscalers.

Not a model of any engine's speed: it has what scaling depends on. A prefill worker computes one prompt after the
other; a decode worker gives each of its sequences a token every `itl_floor + itl_slope * sequences` and holds their
KV; a request takes room in decode first, then its turn at prefill (as the handoff does). Workers start late.
"""

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from kvasir_operator.api import WORKER_ROLES, WorkerRole
from kvasir_operator.scaling.planner import Signals

SYNC_SECONDS = 15.0


@dataclass(frozen=True)
class Model:
    """Rates of one worker of one GPU each, and the objectives. Tokens, seconds."""

    prefill_rate: float = 20_000.0
    itl_floor: float = 0.010
    itl_slope: float = 0.00015
    kv_tokens: int = 450_000
    startup: float = 90.0
    most_workers: int = 16
    ttft: float = 2.0
    itl: float = 0.040


@dataclass
class Request:
    """One request and what became of it; times in seconds from the trace's begin, -1 until then."""

    arrival: float
    prompt: int
    output: int
    first: float = -1.0
    end: float = -1.0

    def met(self, model: Model) -> bool:
        """Whether it was answered within both objectives."""
        if self.end < 0 or self.first - self.arrival > model.ttft:
            return False
        return (self.end - self.first) / self.output <= model.itl


@dataclass(frozen=True)
class Sight:
    """What a scaler sees at a sync. `started`: workers that are ready, `asked`: all that are asked for."""

    now: float
    ready: Mapping[WorkerRole, int]
    asked: Mapping[WorkerRole, int]
    signals: Signals
    busy: float  # share of the time that a ready prefill worker computed, mean


Scaler = Callable[[Sight], Mapping[WorkerRole, int]]


@dataclass
class Outcome:
    """What a scaler made of a trace. `sizes`: time and workers asked for of each role, at each change."""

    requests: int
    met: int
    gpu_hours: float
    sizes: dict[WorkerRole, list[tuple[float, int]]]

    @property
    def attainment(self) -> float:
        """Share of requests within both objectives."""
        return self.met / max(1, self.requests)

    @property
    def per_gpu_hour(self) -> float:
        """Requests within both objectives for a GPU-hour."""
        return self.met / max(1e-9, self.gpu_hours)

    def flaps(self, window: float) -> int:
        """Times that a role went down within `window` seconds of having gone up."""
        return sum(
            later[1] < now[1] > before[1] and later[0] - now[0] < window
            for sizes in self.sizes.values()
            for before, now, later in zip(sizes, sizes[1:], sizes[2:], strict=False)
        )


@dataclass
class _Decode:
    """A decode worker: sequences share its time, so each has had `given` tokens since the worker began."""

    given: float = 0.0
    kv: int = 0
    sequences: list[tuple[float, int, Request]] = field(default_factory=list)  # a heap by the token it ends at

    def itl(self, model: Model) -> float:
        return model.itl_floor + model.itl_slope * len(self.sequences)


class Twin:
    """Runs one trace under one scaler."""

    def __init__(self, model: Model, trace: list[Request], scaler: Scaler, step: float = 0.05) -> None:
        self._model, self._scaler, self._step = model, scaler, step
        self._trace = deque(trace)
        self._ids = itertools.count()
        self._queue: deque[Request] = deque()
        self._asked: dict[WorkerRole, int] = {"prefill": 1, "decode": 1}
        self._starting: dict[WorkerRole, list[float]] = {"prefill": [], "decode": []}
        self._prefill: list[tuple[float, _Decode, Request] | None] = [None]
        self._decode: list[_Decode] = [_Decode()]
        self._leaving: list[_Decode] = []
        self._sizes: dict[WorkerRole, list[tuple[float, int]]] = {r: [(0.0, 1)] for r in WORKER_ROLES}
        self._interval = _Interval()
        self._gpu_seconds = 0.0
        self._done: list[Request] = []

    def run(self, seconds: float) -> Outcome:
        """Play the trace, which lasts `seconds`; what is unfinished then has missed its objectives."""
        total, next_sync = len(self._trace), SYNC_SECONDS
        for tick in range(int(seconds / self._step)):
            now = tick * self._step
            while self._trace and self._trace[0].arrival <= now:
                self._queue.append(self._trace.popleft())
                self._interval.arrivals += 1
            self._start_workers(now)
            self._prefill_step(now)
            self._decode_step(now)
            workers = len(self._prefill) + len(self._decode) + len(self._leaving)
            self._gpu_seconds += self._step * (workers + sum(map(len, self._starting.values())))
            if now >= next_sync:
                next_sync += SYNC_SECONDS
                self._scale(now)
        met = sum(request.met(self._model) for request in self._done)
        return Outcome(total, met, self._gpu_seconds / 3600, self._sizes)

    def _start_workers(self, now: float) -> None:
        for role in WORKER_ROLES:
            due = [at for at in self._starting[role] if at <= now]
            self._starting[role] = [at for at in self._starting[role] if at > now]
            for _ in due:
                if role == "prefill":
                    self._prefill.append(None)
                else:
                    self._decode.append(_Decode())

    def _prefill_step(self, now: float) -> None:
        for index, work in enumerate(self._prefill):
            if work is not None and work[0] <= now:
                self._begin_decode(work[1], work[2], work[0])
                work = self._prefill[index] = None
            if work is None and self._queue and (decode := self._roomy(self._queue[0])) is not None:
                request = self._queue.popleft()
                decode.kv += request.prompt + request.output
                seconds = request.prompt / self._model.prefill_rate
                self._prefill[index] = (now + seconds, decode, request)
                self._interval.prefilled += 1
                self._interval.busy += seconds

    def _roomy(self, request: Request) -> _Decode | None:
        least = min(self._decode, key=lambda each: each.kv, default=None)
        if least is None or least.kv + request.prompt + request.output > self._model.kv_tokens:
            return None
        return least

    def _begin_decode(self, decode: _Decode, request: Request, now: float) -> None:
        request.first = now
        self._interval.ttfts.append(now - request.arrival)
        heapq.heappush(decode.sequences, (decode.given + request.output, next(self._ids), request))

    def _decode_step(self, now: float) -> None:
        for each in (*self._decode, *self._leaving):
            if each.sequences:
                itl = each.itl(self._model)
                self._interval.itl_sum += itl * len(each.sequences)
                self._interval.itl_count += len(each.sequences)
                each.given += self._step / itl
            while each.sequences and each.sequences[0][0] <= each.given:
                _, _, request = heapq.heappop(each.sequences)
                request.end = now
                each.kv -= request.prompt + request.output
                self._interval.residences.append(now - request.first)
                self._done.append(request)
        self._leaving = [each for each in self._leaving if each.kv > 0]

    # Scaling

    def _scale(self, now: float) -> None:
        sight = self._sight(now)
        for role, size in self._scaler(sight).items():
            size = min(max(1, size), self._model.most_workers)
            if size == self._asked[role]:
                continue
            self._resize(role, size - self._asked[role], now)
            self._asked[role] = size
            self._sizes[role].append((now, size))

    def _resize(self, role: WorkerRole, change: int, now: float) -> None:
        if change > 0:
            self._starting[role] += [now + self._model.startup] * change
            return
        for _ in range(-change):
            if self._starting[role]:
                self._starting[role].pop()
            elif role == "decode":
                least = min(self._decode, key=lambda each: each.kv)
                self._decode.remove(least)
                self._leaving.append(least)
            else:
                # What computes goes on to the end; an idle one goes first.
                index = next((i for i, work in enumerate(self._prefill) if work is None), len(self._prefill) - 1)
                work = self._prefill.pop(index)
                if work is not None:
                    self._begin_decode(work[1], work[2], work[0])

    def _sight(self, now: float) -> Sight:
        done, self._interval = self._interval, _Interval()
        running = sum(len(each.sequences) for each in (*self._decode, *self._leaving))
        ready: dict[WorkerRole, int] = {"prefill": len(self._prefill), "decode": len(self._decode)}
        pages = len(self._decode) * self._model.kv_tokens
        signals = Signals(
            arrivals=done.arrivals / SYNC_SECONDS,
            inflight=running + len(self._queue) + sum(work is not None for work in self._prefill),
            waiting=len(self._queue),
            running=running,
            prefill_seconds=_mean(done.busy, done.prefilled),
            decode_seconds=_mean(sum(done.residences), len(done.residences)),
            ttft=_mean(sum(done.ttfts), len(done.ttfts)),
            itl=_mean(done.itl_sum, done.itl_count),
            itl_floor=self._model.itl_floor,
            kv_use=sum(each.kv for each in self._decode) / pages,
            startup=self._model.startup,
        )
        busy = min(1.0, done.busy / SYNC_SECONDS / len(self._prefill))
        return Sight(now, ready, dict(self._asked), signals, busy)


@dataclass
class _Interval:
    """Counts between two syncs."""

    arrivals: int = 0
    prefilled: int = 0
    busy: float = 0.0
    itl_sum: float = 0.0
    itl_count: int = 0
    ttfts: list[float] = field(default_factory=list)
    residences: list[float] = field(default_factory=list)


def _mean(total: float, count: int) -> float | None:
    return total / count if count else None


def bursty(seed: int, seconds: float) -> list[Request]:
    """Arrivals at a swaying base rate with bursts of 3 to 8 times as much, that take 20 to 90 s to rise."""
    chance = random.Random(seed)
    bursts = list(_bursts(chance, seconds))

    def rate(at: float) -> float:
        base = 4.0 + 2.0 * math.sin(2 * math.pi * at / 3600)
        return base * (1 + sum(height * _shape(at, *burst) for height, *burst in bursts))

    most, at, trace = 6.0 * 16, 0.0, []
    while (at := at + chance.expovariate(most)) < seconds:
        if chance.random() < rate(at) / most:  # thinning
            prompt = min(16_000, int(chance.lognormvariate(7.6, 0.7)))
            output = min(2_000, 1 + int(chance.lognormvariate(5.9, 0.6)))
            trace.append(Request(at, prompt, output))
    return trace


def _bursts(chance: random.Random, seconds: float) -> Iterator[tuple[float, float, float, float]]:
    at = chance.uniform(120, 600)
    while at < seconds:
        yield chance.uniform(2, 7), at, chance.uniform(20, 90), chance.uniform(120, 420)
        at += chance.uniform(500, 1500)


def _shape(at: float, begin: float, rise: float, length: float) -> float:
    """1 while the burst lasts, less while it rises and falls."""
    return max(0.0, min(1.0, (at - begin) / rise, (begin + 2 * rise + length - at) / rise))
