"""The scaling planner against two independent HorizontalPodAutoscalers, on bursty traces in a model of both pools.

`python -m bench.scaling` prints, for each trace and scaler, the share of requests within both objectives (TTFT and
ITL), the GPU-hours, and the requests within the objectives for a GPU-hour, with the pools' sizes over time.

The HPAs follow the documented algorithm (kubernetes.io, tasks/run-application/horizontal-pod-autoscale): desired
= ceil(ready * metric / target) with tolerance 0.1, pods that are not ready yet counted as idle when scaling up, at
most twice the pods or four more each 15 s, and scaling down only to the most that was recommended in 5 minutes.
Prefill's HPA looks at its queue or at how busy its workers are, decode's at sequences a worker; both targets are
tried over a range, and the best on each trace is what is compared: nobody has that luck in production.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from bench.twin import SYNC_SECONDS, Model, Outcome, Scaler, Sight, Twin, bursty

from kvasir_operator.api import WORKER_ROLES, WorkerRole
from kvasir_operator.scaling.planner import Bounds, Decision, Need, RolePool, Targets, decide

TOLERANCE = 0.1
STABILIZATION_SECONDS = 300.0
SECONDS = 3600.0
WINDOW = 300.0


@dataclass
class HPA:
    """One HorizontalPodAutoscaler. `metric` gives the mean of the ready pods in units of its target."""

    role: WorkerRole
    metric: Callable[[Sight], float]
    recommended: list[tuple[float, int]] = field(default_factory=list)

    def size(self, sight: Sight) -> int:
        """The replicas that it sets now."""
        asked, ready = sight.asked[self.role], sight.ready[self.role]
        ratio = self.metric(sight)
        wanted = asked
        if ratio > 1 + TOLERANCE:
            shared = ratio * ready / max(asked, ready)  # those that start count as idle
            wanted = math.ceil(shared * asked - 1e-9) if shared > 1 + TOLERANCE else asked
        elif ratio < 1 - TOLERANCE:
            wanted = min(asked, math.ceil(ratio * ready - 1e-9))
        self.recommended = [each for each in self.recommended if sight.now - each[0] < STABILIZATION_SECONDS]
        self.recommended.append((sight.now, wanted))
        if wanted < asked:
            wanted = min(asked, max(size for _, size in self.recommended))
        return max(1, min(wanted, 2 * asked, max(2 * asked, asked + 4)))


def two_hpas(by: str, prefill: float, decode: float) -> Scaler:
    """An HPA a role. `by` "queue": `prefill` requests a prefill worker; "busy": its share of busy time."""

    def queue(sight: Sight) -> float:
        return (sight.signals.waiting / max(1, sight.ready["prefill"]) + sight.busy) / prefill

    def busy(sight: Sight) -> float:
        return sight.busy / prefill

    def sequences(sight: Sight) -> float:
        return sight.signals.running / max(1, sight.ready["decode"]) / decode

    pair = (HPA("prefill", queue if by == "queue" else busy), HPA("decode", sequences))
    return lambda sight: {hpa.role: hpa.size(sight) for hpa in pair}


def hpa_grid() -> Iterator[tuple[str, float, float]]:
    """The targets that are tried."""
    for decode in (60.0, 90.0, 120.0, 150.0):
        for prefill in (0.5, 0.65, 0.8):
            yield "busy", prefill, decode
        for prefill in (1.0, 2.0, 4.0, 8.0):
            yield "queue", prefill, decode


def planner(model: Model, window: float = WINDOW) -> Scaler:
    """Kvasir's planner, with the objectives as its targets."""
    bounds: dict[WorkerRole, Bounds] = {role: Bounds(1, model.most_workers) for role in WORKER_ROLES}
    targets = Targets(model.ttft, model.itl, window)
    needs: dict[WorkerRole, tuple[Need, ...] | None] = dict.fromkeys(WORKER_ROLES, None)

    def scale(sight: Sight) -> Mapping[WorkerRole, int]:
        pools = {role: RolePool(sight.asked[role], sight.ready[role], needs[role]) for role in WORKER_ROLES}
        decided: dict[WorkerRole, Decision] = decide(sight.now, pools, bounds, targets, sight.signals)
        needs.update({role: each.needs for role, each in decided.items()})
        return {role: each.replicas for role, each in decided.items()}

    return scale


def play(seed: int, scaler: Scaler, model: Model, seconds: float = SECONDS) -> Outcome:
    """One trace under one scaler."""
    return Twin(model, bursty(seed, seconds), scaler).run(seconds)


def row(name: str, outcome: Outcome) -> str:
    """One line of the table."""
    return (
        f"  {name:<34} {outcome.attainment:7.1%} {outcome.gpu_hours:7.2f} {outcome.per_gpu_hour:9.0f}"
        f" {outcome.flaps(WINDOW):5d}"
    )


def timeline(outcome: Outcome, seconds: float) -> list[str]:
    """The sizes of both pools, a character each half minute (hexadecimal)."""
    lines = []
    for role in WORKER_ROLES:
        sizes, text, at = outcome.sizes[role], "", 0.0
        while at < seconds:
            text += f"{min(15, [size for since, size in sizes if since <= at][-1]):x}"
            at += 2 * SYNC_SECONDS
        lines.append(f"    {role:<8} {text}")
    return lines


def load(seed: int, seconds: float) -> str:
    """The trace: arrivals in each half minute, as tenths of the most."""
    counts = [0] * math.ceil(seconds / 30)
    for request in bursty(seed, seconds):
        counts[int(request.arrival / 30)] += 1
    return "    arrivals " + "".join(f"{9 * count // max(counts)}" for count in counts)


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4, help="traces")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="length of a trace")
    arguments = parser.parse_args()
    model = Model()
    print(f"{model}")
    print(f"  {'scaler':<34} {'in SLO':>7} {'GPU-h':>7} {'ok/GPU-h':>9} {'flaps':>5}")
    for seed in range(arguments.seeds):
        ours = play(seed, planner(model), model, arguments.seconds)
        tried = {each: play(seed, two_hpas(*each), model, arguments.seconds) for each in hpa_grid()}
        by, prefill, decode = best = max(tried, key=lambda each: tried[each].per_gpu_hour)
        safest = max(tried, key=lambda each: tried[each].attainment)
        print(f"trace {seed}: {ours.requests} requests")
        print(row("planner", ours))
        print(row(f"best HPAs: {by} {prefill:g}, sequences {decode:g}", tried[best]))
        print(row("most in SLO: {} {:g}, sequences {:g}".format(*safest), tried[safest]))
        print(load(seed, arguments.seconds))
        for name, outcome in (("planner", ours), ("best HPAs", tried[best])):
            print(f"   {name}", *timeline(outcome, arguments.seconds), sep="\n")


if __name__ == "__main__":
    main()
