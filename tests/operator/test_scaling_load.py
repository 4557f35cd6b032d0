"""What pods report, as the scaling planner's signals: sums, means, silence; and how they are asked."""

import asyncio

import httpx
import msgspec
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from kvasir_engine.rolling_window import Sum
from kvasir_engine.status_reports import PairReport, RouterLoad, RouterStatus, WorkerLoad, WorkerStatus
from kvasir_operator.metrics import OperatorMetrics
from kvasir_operator.plan.observed import Observed, observe
from kvasir_operator.reconcile import pod_reader
from kvasir_operator.reconcile.pod_reader import PodReader
from kvasir_operator.scaling.planner import Signals
from kvasir_operator.scaling.roles import RoleScaling, ScalingStatus, remembered
from kvasir_operator.scaling.signals import STARTUP_SECONDS, PodReports, median_startup_seconds, signals


def router(inflight: int = 0, **load: object) -> RouterStatus:
    nothing: dict[str, object] = {
        "seconds": 15.0,
        "arrivals": 0,
        "held": 0,
        "idle": 0.0,
        "ttft": Sum(),
        "itl": Sum(),
        "decode": Sum(),
    }
    return RouterStatus(False, inflight, "", PairReport(), RouterLoad(**{**nothing, **load}))  # type: ignore[arg-type]


def worker(**load: object) -> WorkerStatus:
    nothing = {"waiting": 0, "running": 0, "used_pages": 0, "pages": 100, "prompts": 0, "busy": 0.0, "alone": 0.0}
    return WorkerStatus(False, 0, 0, None, WorkerLoad(**{**nothing, **load}))  # type: ignore[arg-type]


def test_the_load_of_all_pods_is_put_together() -> None:
    told = PodReports(
        routers=(
            router(7, arrivals=30, idle=3.0, ttft=Sum(30, 30.0), itl=Sum(100, 2.0), decode=Sum(10, 40.0)),
            router(2, arrivals=15, held=1, idle=9.0, ttft=Sum(10, 20.0), itl=Sum(300, 18.0), decode=Sum(30, 360.0)),
        ),
        prefill=(worker(waiting=3, prompts=40, busy=8.0), worker(waiting=2, prompts=60, busy=22.0)),
        decode=(
            worker(running=9, waiting=1, used_pages=50, alone=0.012),
            worker(running=4, used_pages=60, pages=300, alone=0.011),
        ),
    )
    assert signals(told, 33.0) == Signals(
        arrivals=3.0,
        held=1,
        inflight=9,
        waiting=5,
        queued=1,
        running=13,
        prefill_seconds=0.3,
        decode_seconds=10.0,
        ttft=1.25,
        itl=0.05,
        itl_floor=0.011,
        kv_use=0.275,
        startup=33.0,
        idle_seconds=3.0,
        partial=False,
    )


def test_what_nobody_measured_is_no_figure() -> None:
    found = signals(PodReports((router(),), (worker(),), (worker(),)))
    assert found is not None
    assert (found.prefill_seconds, found.decode_seconds, found.ttft, found.itl) == (None, None, None, None)
    assert found.itl_floor == found.kv_use == 0.0
    assert signals(PodReports()) is None
    assert signals(PodReports((None, None), (worker(),), (worker(),))) is None
    old = msgspec.structs.replace(router(), load=None)
    assert signals(PodReports((old,))) is None, "a router of an older engine"


def test_a_router_that_has_only_just_started_shows_no_burst() -> None:
    found = signals(PodReports((router(seconds=0.5, arrivals=3),)))
    assert found is not None
    assert found.arrivals == pytest.approx(0.2)


def test_workers_that_are_silent_are_taken_to_be_as_the_others() -> None:
    told = PodReports((router(),), (worker(waiting=4),), (worker(running=6, waiting=2), None, None))
    found = signals(told)
    assert found is not None
    assert (found.waiting, found.running, found.queued) == (4, 18, 6)
    assert found.partial
    assert not found.idle


@pytest.mark.parametrize(
    "told",
    [
        PodReports((router(), None), (worker(),), (worker(),)),
        PodReports((router(),), (None,), (worker(),)),
        PodReports((router(),), (worker(),), (None,)),
        PodReports((router(),), (worker(),), (msgspec.structs.replace(worker(), load=None),)),
    ],
)
def test_whoever_is_silent_is_noticed(told: PodReports) -> None:
    found = signals(told)
    assert found is not None
    assert found.partial


def test_how_long_workers_take_to_start_is_read_off_their_pods() -> None:
    def pod(name: str, ready: int | None, role: str = "decode") -> dict[str, object]:
        became = {"type": "Ready", "status": "True", "lastTransitionTime": f"2026-01-01T00:01:{ready}Z"}
        return {
            "metadata": {
                "name": name,
                "labels": {"serving.kvasir.dev/role": role},
                "creationTimestamp": "2026-01-01T00:01:00Z",
            },
            "status": {"conditions": [became] if ready else []},
        }

    pods = [pod("a", 10), pod("b", 12), pod("c", 59), pod("d", None), pod("r", 58, "router")]
    assert median_startup_seconds(observe([], pods)) == 12.0
    assert median_startup_seconds(Observed()) == STARTUP_SECONDS


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"mode": "Auto"},
        {"mode": "Other", "prefill": {}, "decode": {}},
        {
            "mode": "Auto",
            "prefill": {"replicas": 1, "reason": "r", "since": "s", "needed": [{"replicas": 1, "until": "soon"}]},
            "decode": {"replicas": 1, "reason": "r", "since": "s"},
        },
    ],
)
def test_a_status_that_is_not_understood_remembers_nothing(scaling: object) -> None:
    assert remembered({"scaling": scaling} if scaling else {}) is None


# How they are asked


def test_many_pods_are_asked_at_once_and_none_is_waited_for_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pod_reader, "ALL_SECONDS", 2.0)

    async def reply(request: httpx.Request) -> httpx.Response:
        if request.url.host == "10.0.0.3":
            await asyncio.Event().wait()
        return httpx.Response(200, content=msgspec.json.encode(worker(running=2)))

    ips = [f"10.0.0.{place}" for place in range(70)]
    told = PodReader(httpx.MockTransport(reply)).workers(ips)
    assert [place for place, each in enumerate(told) if each is None] == [3]
    assert told[69] == worker(running=2)


def test_metrics_show_what_was_decided_and_from_what() -> None:
    metrics = OperatorMetrics(CollectorRegistry())
    role = RoleScaling(3, "why", "since")
    metrics.scaling.show(("ns", "llama"), ScalingStatus("Shadow", role, role), Signals(ttft=0.5))
    shown = generate_latest(metrics.registry).decode()
    service = 'inferenceservice="llama",'
    assert f'scaling_desired_replicas{{{service}mode="Shadow",namespace="ns",role="decode"}} 3.0' in shown
    assert f'scaling_load{{{service}namespace="ns",signal="ttft"}} 0.5' in shown
    assert 'signal="itl"' not in shown, "it was not measured"
    metrics.scaling.show(("ns", "llama"), None, None)
    assert "llama" not in generate_latest(metrics.registry).decode()
