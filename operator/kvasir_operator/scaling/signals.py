"""PURE: turns the reports of routers and workers into the scaling planner's signals."""

from collections.abc import Callable, Sequence
from statistics import median

import msgspec

from kvasir_engine.rolling_window import Sum
from kvasir_engine.status_reports import LOAD_SECONDS, RouterStatus, WorkerLoad, WorkerStatus
from kvasir_operator.api import WORKER_ROLES
from kvasir_operator.plan.observed import Observed
from kvasir_operator.scaling.planner import Signals

STARTUP_SECONDS = 60.0  # where no worker has started yet


class PodReports(msgspec.Struct, frozen=True):
    """The report of each pod that is ready; `None` for one that does not answer."""

    routers: tuple[RouterStatus | None, ...] = ()
    prefill: tuple[WorkerStatus | None, ...] = ()
    decode: tuple[WorkerStatus | None, ...] = ()


def signals(reports: PodReports, startup: float = STARTUP_SECONDS) -> Signals | None:
    """The load of all pods together; `None` where no router reports any. Silent workers count as the others do."""
    routers = [(each, each.load) for each in reports.routers if each and each.load]
    if not routers:
        return None
    loads = [load for _, load in routers]
    prefill, decode = _answers(reports.prefill), _answers(reports.decode)
    lacks = len(routers) < len(reports.routers)
    lacks |= len(prefill) < len(reports.prefill) or len(decode) < len(reports.decode)
    itl, ttft, decoding = (
        sum(sums, Sum()) for sums in zip(*((x.itl, x.ttft, x.decode) for x in loads), strict=True)
    )
    prompts = sum(each.prompts for each in prefill)
    pages = sum(each.pages for each in decode)
    alone = [each.alone for each in decode if each.alone]
    return Signals(
        # A router that has only just started has not seen the whole window: no rate from a few moments.
        arrivals=sum(each.arrivals / max(each.seconds, LOAD_SECONDS) for each in loads),
        held=sum(each.held for each in loads),
        inflight=sum(each.inflight for each, _ in routers),
        waiting=_all(reports.prefill, prefill, lambda each: each.waiting),
        queued=_all(reports.decode, decode, lambda each: each.waiting),
        running=_all(reports.decode, decode, lambda each: each.running),
        prefill_seconds=sum(each.busy for each in prefill) / prompts if prompts else None,
        decode_seconds=decoding.mean,
        ttft=ttft.mean,
        itl=itl.mean,
        itl_floor=min(alone, default=0.0),
        kv_use=sum(each.used_pages for each in decode) / pages if pages else 0.0,
        startup=startup,
        idle_seconds=min(each.idle for each in loads),
        partial=lacks,
    )


def median_startup_seconds(observed: Observed) -> float:
    """The median time from a worker's creation to its readiness."""
    workers = (pod for pod in observed.pods if pod.role in WORKER_ROLES and not pod.follower)
    taken = [pod.started for pod in workers if pod.started is not None]
    return median(taken) if taken else STARTUP_SECONDS


def _answers(reports: Sequence[WorkerStatus | None]) -> list[WorkerLoad]:
    return [each.load for each in reports if each and each.load]


def _all(reports: Sequence[object], answers: Sequence[WorkerLoad], count: Callable[[WorkerLoad], int]) -> int:
    """The sum over all workers, extrapolated from those that answer."""
    known = sum(map(count, answers))
    return round(known * len(reports) / len(answers)) if answers else 0
