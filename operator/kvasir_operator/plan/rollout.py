"""PURE: the replicas to set next, so that prefill and decode change together and paired capacity is kept.

Only integers that are observed go in, so a plan that was cut off, sent to a third revision, rolled back or scaled
half way goes on from what is there. Paired capacity is the sum over KV fingerprints of `min(prefill ready /
prefill target, decode ready / decode target)`: prefill without decode of the same KV is worth nothing. No step
takes it below `floor(state)`, nor below what it is already.

Limits hold for each role, as those of a Deployment do: a role has at most `target + surge` replicas over all
revisions (pods on their way out do not count), and no step leaves fewer than `target - unavailable` of it ready.
The floor is what the looser of the two roles allows, `1 - max(unavailable / target)`: with the absolute limit 1
and targets 2 and 16 one prefill worker may be away, and half the pairs with it. With a percentage p it is at
least `1 - p`, unless surge and unavailable both come to 0 replicas: then unavailable is 1, as in a Deployment.

The newcomer grows as far as the surge lets it; of the old ones goes, one by one, whatever costs the least
capacity, as long as that stays at the floor. Two fingerprints can always be exchanged so: where the old one has
given up i of P and j of D, and the new one has one more of each ready, capacity is at least 1 exactly while [i/P,
(i+1)/P] and [j/D, (j+1)/D] overlap, and they still do when the role whose interval ends first goes on. Three
fingerprints cannot always: the fractions of a worker that they leave without a partner may add up to more than
the surge. So where two old ones are left (the target changed half way), the one that serves more first takes over
the other's share. That way there are never three, however often the target changes.
"""

from collections.abc import Iterable
from fractions import Fraction

import msgspec

from kvasir_operator.api import WORKER_ROLES, WorkerRole


class Goal(msgspec.Struct, frozen=True):
    """The wanted workers of a role: `replicas` of `revision`, with the limits on the way there, in replicas."""

    revision: str
    kv: str
    replicas: int
    surge: int = 1
    unavailable: int = 0


class RevisionGroup(msgspec.Struct, frozen=True):
    """The workers of one revision of a role: `replicas` are wanted of it now, `ready` of them are ready."""

    role: WorkerRole
    revision: str
    kv: str
    replicas: int
    ready: int


class State(msgspec.Struct, frozen=True):
    """All that a step depends on. A revision appears once a role; the wanted one may be missing."""

    prefill: Goal
    decode: Goal
    groups: tuple[RevisionGroup, ...] = ()

    def goal(self, role: WorkerRole) -> Goal:
        """The goal of `role`."""
        return self.prefill if role == "prefill" else self.decode


class ScaleRevision(msgspec.Struct, frozen=True):
    """Set the replicas of this revision."""

    role: WorkerRole
    revision: str
    replicas: int


def limit(value: int | str, target: int, *, up: bool) -> int:
    """`maxSurge` (up) or `maxUnavailable` in replicas: a count, or a percentage of `target`, rounded."""
    text = str(value)
    if not text.endswith("%"):
        return int(text)
    percent = int(text[:-1])
    return -(-target * percent // 100) if up else target * percent // 100


def goal(revision: str, kv: str, replicas: int, max_surge: int | str, max_unavailable: int | str) -> Goal:
    """A goal with the limits of a spec."""
    surge, unavailable = limit(max_surge, replicas, up=True), limit(max_unavailable, replicas, up=False)
    if surge == 0 and unavailable == 0:
        unavailable = 1
    return Goal(revision, kv, replicas, surge, min(unavailable, replicas))


def capacity(state: State) -> Fraction:
    """The paired capacity of the ready workers; above 1 while there are more than are wanted."""
    board = _ReplicaCounts(state)
    return Fraction(board.capacity(), board.unit)


def floor(state: State) -> Fraction:
    """The lowest paired capacity that a rollout may leave."""
    board = _ReplicaCounts(state)
    return Fraction(board.floor, board.unit)


def done(state: State) -> bool:
    """Whether the wanted revisions have all their replicas, and no other revision has any."""
    return not next_step(state) and _ReplicaCounts(state).settled_on_goal()


def next_step(state: State) -> tuple[ScaleRevision, ...]:
    """The replicas to set now, none while pods have to become ready first (or all is done).

    Every part of a step may be carried out without the rest, and in any order.
    """
    board = _ReplicaCounts(state)
    growth = board.growth()
    board.shrink(bool(growth))
    changes = {(g.role, g.revision): left for g, left in board.left() if left != g.replicas}
    return tuple(ScaleRevision(role, revision, n) for (role, revision), n in (*changes.items(), *growth.items()))


def apply(state: State, steps: Iterable[ScaleRevision]) -> State:
    """`state` once `steps` are carried out; where replicas go, those that are not ready go first."""
    groups = {(g.role, g.revision): g for g in state.groups}
    for step in steps:
        group = groups.get((step.role, step.revision))
        if group is None:
            group = RevisionGroup(step.role, step.revision, state.goal(step.role).kv, 0, 0)
        groups[step.role, step.revision] = msgspec.structs.replace(
            group, replicas=step.replicas, ready=min(group.ready, step.replicas)
        )
    return msgspec.structs.replace(state, groups=tuple(groups.values()))


class _ReplicaCounts:
    """The counts while a step is worked out. Capacities are integers in units of 1 / (P * D)."""

    def __init__(self, state: State) -> None:
        self._goals = (state.prefill, state.decode)
        self._weights = _weights(state.prefill.replicas, state.decode.replicas)
        self.unit = max(1, state.prefill.replicas) * max(1, state.decode.replicas)
        away = (w * g.unavailable for w, g in zip(self._weights, self._goals, strict=True))
        self.floor = max(0, self.unit - max(away))
        self._groups = state.groups
        self._side = [WORKER_ROLES.index(g.role) for g in self._groups]
        self._wanted = [g.replicas for g in self._groups]
        self._ready = [min(g.ready, g.replicas) for g in self._groups]
        self._by_kv: dict[str, list[int]] = {}
        for group, side, ready in zip(self._groups, self._side, self._ready, strict=True):
            self._by_kv.setdefault(group.kv, [0, 0])[side] += ready
        self._sinks = [self._sink(side) for side in (0, 1)]

    def capacity(self) -> int:
        """Paired capacity in `unit`s."""
        return sum(self._worth(*ready) for ready in self._by_kv.values())

    def left(self) -> list[tuple[RevisionGroup, int]]:
        """Every group with its remaining replicas."""
        return list(zip(self._groups, self._wanted, strict=True))

    def settled_on_goal(self) -> bool:
        """Whether only the wanted revisions have replicas."""
        found = {(g.role, g.revision): g.replicas for g in self._groups if g.replicas}
        goals = zip(WORKER_ROLES, self._goals, strict=True)
        return found == {(role, g.revision): g.replicas for role, g in goals if g.replicas}

    def growth(self) -> dict[tuple[WorkerRole, str], int]:
        """The replicas of the growing groups, within the surge that is there now."""
        result: dict[tuple[WorkerRole, str], int] = {}
        for side, (role, goal) in enumerate(zip(WORKER_ROLES, self._goals, strict=True)):
            revision, kv = self._sinks[side]
            there = sum(
                n
                for g, s, n in zip(self._groups, self._side, self._wanted, strict=True)
                if s == side and g.kv == kv and (g.revision == revision or kv != goal.kv)
            )
            total = sum(n for s, n in zip(self._side, self._wanted, strict=True) if s == side)
            more = min(goal.replicas - there, goal.replicas + goal.surge - total)
            if more > 0:
                now = next((g.replicas for g in self._groups if (g.role, g.revision) == (role, revision)), 0)
                result[role, revision] = now + more
        return result

    def shrink(self, growing: bool) -> None:
        """Remove what capacity can spare from the groups of other revisions."""
        victims = [i for i in range(len(self._groups)) if self._spare(i)]
        # With nothing ready among them there is nothing to lose. Else those that are not ready may come back, and
        # are given up only for others that serve.
        hopeless = not any(self._ready[i] for i in victims)
        pending = growing or any(self._pending(side) for side in (0, 1))
        ready = [sum(r for s, r in zip(self._side, self._ready, strict=True) if s == side) for side in (0, 1)]
        now = self.capacity()
        while True:
            best: tuple[int, bool, int, int] | None = None
            for i in victims:
                if not self._spare(i):
                    continue
                side, idle = self._side[i], self._wanted[i] > self._ready[i]
                if idle:
                    after = now
                    allowed = hopeless or now >= self.floor or not pending
                else:
                    after = now - self._loss(i)
                    goal = self._goals[side]
                    allowed = after >= min(now, self.floor) and ready[side] > goal.replicas - goal.unavailable
                if allowed:
                    best = max(
                        best or (-1, False, 0, 0), (after, idle, -self._worth(*self._by_kv[self._kv(i)]), -i)
                    )
            if best is None:
                return
            now, i = best[0], -best[3]
            self._wanted[i] -= 1
            if not best[1]:
                self._ready[i] -= 1
                self._by_kv[self._kv(i)][self._side[i]] -= 1
                ready[self._side[i]] -= 1

    def _kv(self, i: int) -> str:
        return self._groups[i].kv

    def _worth(self, prefill: int, decode: int) -> int:
        a, b = self._weights
        if a and b:
            return min(prefill * a, decode * b)
        return prefill * a + decode * b  # a role of which none is wanted limits nothing

    def _loss(self, i: int) -> int:
        ready = self._by_kv[self._kv(i)]
        fewer = [n - (side == self._side[i]) for side, n in enumerate(ready)]
        return self._worth(*ready) - self._worth(*fewer)

    def _sink(self, side: int) -> tuple[str, str]:
        """Revision and fingerprint of the group that grows."""
        goal, keeper = self._goals[side], self._keeper()
        if keeper == goal.kv:
            return goal.revision, goal.kv
        own = [g for g, s in zip(self._groups, self._side, strict=True) if s == side and g.kv == keeper]
        largest = max(own, key=lambda g: (g.replicas, g.revision))
        return largest.revision, keeper

    def _keeper(self) -> str:
        """The fingerprint that grows: the wanted one, once no more than one other is left."""
        wanted = self._goals[0].kv
        others = {g.kv for g in self._groups if g.replicas and g.kv != wanted}
        if len(others) < 2:
            return wanted
        best = max(others, key=lambda kv: (self._worth(*self._by_kv[kv]), kv))
        worth = self._worth(*self._by_kv[best])
        both = len({g.role for g in self._groups if g.replicas and g.kv == best}) == 2
        return best if both and worth > self._worth(*self._by_kv.get(wanted, [0, 0])) else wanted

    def _spare(self, i: int) -> bool:
        """Whether this group has replicas to remove."""
        group, side = self._groups[i], self._side[i]
        goal, (revision, kv) = self._goals[side], self._sinks[side]
        if kv != goal.kv:
            return group.kv != kv and self._wanted[i] > 0
        return self._wanted[i] > (goal.replicas if group.revision == revision else 0)

    def _pending(self, side: int) -> bool:
        revision = self._sinks[side][0]
        return any(
            g.revision == revision and s == side and n > r
            for g, s, n, r in zip(self._groups, self._side, self._wanted, self._ready, strict=True)
        )


def _weights(prefill: int, decode: int) -> tuple[int, int]:
    """The worth of one ready worker of each role, in units of 1 / (P * D)."""
    if prefill and decode:
        return decode, prefill
    return (1 if prefill else 0), (1 if decode else 0)
