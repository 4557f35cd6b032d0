"""PURE: how many workers each role should have, from what routers and workers measure.

Prefill moves on the work that arrives (and so on TTFT, which is what a backlog costs), decode on the inter-token
latency and on KV memory. Three things set this apart from one autoscaler a role:

- Both roles are sized from the same arrivals. Sequences that wait for prefill are decode's load of the next minute,
  so decode workers begin to start when the burst comes and not when it has passed through prefill.
- A worker takes its start-up time before it helps, so a backlog is sized by what it will be then.
- Roles go to zero and come back together: one without the other serves nothing.

A role never goes down within `window` seconds of a moment at which it needed more, so it cannot go up, down and up
again within a window, whatever the load does. Nor does it go down while somebody who should tell of the load is
silent: what was not measured is no zero.
"""

import math
from collections.abc import Mapping

import msgspec

from kvasir_operator.api import WORKER_ROLES, WorkerRole

# Prefill is sized so that it is busy for this share of the time; above it, queues grow quickly (an M/D/c queue's
# wait rises with 1 / (1 - utilisation)).
PREFILL_BUSY = 0.6
# Room below the ITL target and below full KV memory, for the unevenness between workers.
ITL_ROOM = 0.85
KV_ROOM = 0.65
# Most that arrivals may raise decode's expected load above what runs now, as one interval's arrivals are noisy.
MOST_GROWTH = 4.0


class Bounds(msgspec.Struct, frozen=True):
    """The least and most workers of a role while it has any, and how many GPUs one worker takes."""

    least: int
    most: int
    gpus: int = 1


class Targets(msgspec.Struct, frozen=True):
    """The planner's targets. Times in seconds. `gpus`: the most GPUs of both roles together, 0 without a limit.

    `idle`: after so long without a request both roles go to zero, `None`: never. No less than `window`.
    """

    ttft: float
    itl: float
    window: float
    gpus: int = 0
    idle: float | None = None


class Signals(msgspec.Struct, frozen=True):
    """What was measured over the last interval, of all routers and workers together. `None`: nothing to measure.

    `arrivals` in requests a second; `waiting` for prefill, `queued` for room in decode and `running` in decode are
    counts now, `held` are at routers without a worker, `inflight` all that clients wait for. `prefill_seconds` is
    what one request occupies a prefill worker for, `decode_seconds` a decode worker. `ttft`, `itl`: means, in
    seconds; `itl_floor`: the least ITL that was seen, that of a worker with little to do. `kv_use`: share of the
    decode workers' pages in use.
    `startup`: seconds from a worker's creation to its readiness. `idle_seconds`: since any router's last request.
    `partial`: somebody did not answer, and the figures are those of the others.
    """

    arrivals: float = 0.0
    held: int = 0
    inflight: int = 0
    waiting: int = 0
    queued: int = 0
    running: int = 0
    prefill_seconds: float | None = None
    decode_seconds: float | None = None
    ttft: float | None = None
    itl: float | None = None
    itl_floor: float = 0.0
    kv_use: float = 0.0
    startup: float = 60.0
    idle_seconds: float = 0.0
    partial: bool = False

    @property
    def quiet(self) -> bool:
        """Whether no known request arrives, waits or runs."""
        waits = self.held or self.waiting or self.queued
        return not (self.arrivals or waits or self.inflight or self.running)

    @property
    def idle(self) -> bool:
        """Whether no request arrives, waits or runs, by the answers of all pods."""
        return self.quiet and not self.partial


class Need(msgspec.Struct, frozen=True):
    """`replicas` were needed until `until` (seconds of any clock), or still are where it is `None`."""

    replicas: int
    until: float | None = None


class RolePool(msgspec.Struct, frozen=True):
    """A role as it is: `replicas` are asked for, `ready` of them serve.

    `needs`: see `remember`; `None` where nothing is known of the time before.
    """

    replicas: int
    ready: int
    needs: tuple[Need, ...] | None = None


class Decision(msgspec.Struct, frozen=True):
    """The replicas of a role from now on, why, and what to remember for the next decision."""

    replicas: int
    reason: str
    needs: tuple[Need, ...]


def decide(
    now: float,
    pools: Mapping[WorkerRole, RolePool],
    bounds: Mapping[WorkerRole, Bounds],
    targets: Targets,
    signals: Signals | None,
) -> dict[WorkerRole, Decision]:
    """The replicas of each role. With `signals` `None`, where nothing could be measured, no role changes."""
    sleeps = targets.idle is not None and not any(pool.replicas for pool in pools.values())
    if signals is None:
        return {role: _stay(now, pools[role], bounds[role], targets, sleeps) for role in WORKER_ROLES}
    # A router that has only just started has not been idle for long, and wakes nobody.
    asleep = sleeps and signals.quiet
    asleep |= targets.idle is not None and signals.idle and signals.idle_seconds >= targets.idle
    needed = _needs(pools, targets, signals)
    sizes: dict[WorkerRole, int] = {}
    reasons: dict[WorkerRole, str] = {}
    remembered: dict[WorkerRole, tuple[Need, ...]] = {}
    for role in WORKER_ROLES:
        pool, (need, why) = pools[role], needed[role]
        need = min(need, bounds[role].most)
        remembered[role] = remember(_before(pool), now, need, targets.window)
        sizes[role], reasons[role] = _held(pool, need, why, remembered[role], now, targets.window)
        if signals.partial:
            sizes[role] = max(sizes[role], pool.replicas)
    # Both or none: while the window keeps workers of one role, neither has fewer than its least.
    asleep &= not any(sizes.values())
    wanted = {
        role: min(max(sizes[role], 0 if asleep else bounds[role].least), bounds[role].most) for role in WORKER_ROLES
    }
    _pair(wanted, reasons, bounds)
    _fit(wanted, reasons, {role: needed[role][0] for role in WORKER_ROLES}, bounds, targets.gpus)
    return {role: Decision(wanted[role], reasons[role], remembered[role]) for role in WORKER_ROLES}


def remember(needs: tuple[Need, ...], now: float, replicas: int, window: float) -> tuple[Need, ...]:
    """What is needed now, after what more than that was needed within the last `window` seconds, the most first.

    So there are never more than there are sizes of the pool, and nothing changes while the need does not.
    """
    recent = [
        Need(each.replicas, _end(each, now))
        for each in needs
        if each.replicas > replicas and now - _end(each, now) < window
    ]
    return (*recent, Need(replicas))


def _end(need: Need, now: float) -> float:
    return now if need.until is None else need.until


def _needs(
    pools: Mapping[WorkerRole, RolePool], targets: Targets, signals: Signals
) -> dict[WorkerRole, tuple[int, str]]:
    """What the load asks of each role, whatever the bounds say."""
    return {
        "prefill": _prefill(pools["prefill"], targets, signals),
        "decode": _decode(pools["decode"], signals, targets),
    }


def _prefill(pool: RolePool, targets: Targets, signals: Signals) -> tuple[int, str]:
    if signals.quiet:
        return 0, "no requests"
    waiting = signals.waiting + signals.held
    if not signals.arrivals and not waiting:
        return 1, "nothing arrives"
    if signals.prefill_seconds is None or not pool.ready:
        return max(1, pool.replicas), f"{waiting} requests wait" if waiting else "nothing was measured yet"
    busy = signals.arrivals * signals.prefill_seconds
    steady = busy / PREFILL_BUSY
    reason = f"arrivals keep {busy:.1f} workers busy"
    # What will wait when workers that are asked for now can help, and should be gone within as long again.
    later = waiting + (signals.arrivals - pool.ready / signals.prefill_seconds) * signals.startup
    clearing = 0.0
    if waiting * signals.prefill_seconds / pool.ready > targets.ttft and later > 0:
        clearing = later * signals.prefill_seconds / max(signals.startup, targets.ttft)
        reason = f"{waiting} requests wait, {later:.0f} when a worker has started"
    elif (
        signals.ttft is not None and signals.ttft > targets.ttft and not signals.queued and pool.ready + 1 > steady
    ):
        steady = pool.ready + 1.0
        reason = f"TTFT is {signals.ttft:.2f} s, the target {targets.ttft:g} s"
    return math.ceil(max(steady, busy + clearing) - 1e-9), reason


def _decode(pool: RolePool, signals: Signals, targets: Targets) -> tuple[int, str]:
    if signals.quiet:
        return 0, "no requests"
    coming = signals.arrivals * (signals.decode_seconds or 0.0)  # Little's law
    if pool.ready and signals.decode_seconds is not None and not signals.running and not signals.queued:
        return 1, "nothing is decoded at the moment"  # the window keeps what other moments need
    if not pool.ready or not signals.running or signals.itl is None:
        return max(1, pool.replicas), "nothing was measured yet"
    expected = min(max(signals.running, coming), MOST_GROWTH * signals.running) + signals.queued
    each = signals.running / pool.ready
    # ITL rises about linearly with the batch, from what a lone sequence sees.
    above = signals.itl - signals.itl_floor
    room = ITL_ROOM * targets.itl - signals.itl_floor
    by_itl = each * max(room, 0.0) / above if above > 0.02 * targets.itl else math.inf
    by_kv = each * KV_ROOM / signals.kv_use if signals.kv_use > 0.01 else math.inf
    capacity = max(1.0, min(by_itl, by_kv))
    if math.isinf(capacity):
        return 1, f"{expected:.0f} sequences are little"
    why = f"ITL is {1000 * signals.itl:.0f} ms" if by_itl <= by_kv else f"KV memory is {signals.kv_use:.0%} full"
    return math.ceil(expected / capacity - 1e-9), f"{why}, {expected:.0f} sequences of {capacity:.0f} a worker"


def _held(
    pool: RolePool, need: int, why: str, needs: tuple[Need, ...], now: float, window: float
) -> tuple[int, str]:
    """`need`, or more where that was needed within the window."""
    if need >= pool.replicas:
        return need, why
    most = max(needs, key=lambda each: each.replicas)
    if most.replicas > need:
        keeps = min(most.replicas, pool.replicas)
        left = window - (now - _end(most, now))
        return keeps, f"{need} would do ({why}); {keeps} for {left:.0f} s more"
    return need, why


def _pair(
    wanted: dict[WorkerRole, int], reasons: dict[WorkerRole, str], bounds: Mapping[WorkerRole, Bounds]
) -> None:
    """Give a role without workers one where the other role has some, unless its bounds allow none."""
    if all(bounds[role].most for role in WORKER_ROLES) and any(wanted.values()):
        for role in WORKER_ROLES:
            if not wanted[role]:
                wanted[role], reasons[role] = 1, "the other role has workers"


def _fit(
    wanted: dict[WorkerRole, int],
    reasons: dict[WorkerRole, str],
    needs: Mapping[WorkerRole, int],
    bounds: Mapping[WorkerRole, Bounds],
    budget: int,
) -> None:
    """Remove workers until the GPUs suffice, first from the role that keeps the larger share of what it needs."""

    def gpus() -> int:
        return sum(wanted[role] * bounds[role].gpus for role in WORKER_ROLES)

    while budget and gpus() > budget:
        spare = [role for role in WORKER_ROLES if bounds[role].gpus and wanted[role] > max(1, bounds[role].least)]
        if not spare:
            return
        role = max(spare, key=lambda each: wanted[each] / max(1, needs[each]))
        wanted[role] -= 1
        reasons[role] = f"{needs[role]} are needed, the budget is {budget} GPUs"


def _before(pool: RolePool) -> tuple[Need, ...]:
    """What was needed before; where nothing is known of that time, the present replicas."""
    return (Need(pool.replicas),) if pool.needs is None else pool.needs


def _stay(now: float, pool: RolePool, bounds: Bounds, targets: Targets, sleeps: bool) -> Decision:
    """The present size, within the bounds; 0 where both roles sleep."""
    replicas = 0 if sleeps else min(max(pool.replicas, bounds.least), bounds.most)
    needs = remember(_before(pool), now, pool.replicas, targets.window)
    return Decision(replicas, "routers and workers report nothing", needs)
