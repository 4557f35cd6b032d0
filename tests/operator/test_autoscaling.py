"""Services that scale themselves: load, silence, restarts, rollouts and sleep, on virtual time."""

from functools import partial
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from scaling_harness import STARTUP, Load, ScalingHarness

from kvasir_operator.scaling.roles import PERIOD_SECONDS

WINDOW = 300.0
BUSY = Load(arrivals=20.0)  # two seconds of prefill work a second
ZERO = {"idleSeconds": 400, "holdSeconds": 120}


def stand(mode: str = "Auto", load: Load | None = None, replicas: int = 1, **auto: Any) -> ScalingHarness:
    bounds = {"prefill": {"maxReplicas": 8}, "decode": {"maxReplicas": 8}}
    roles = {role: {"device": "cpu", "replicas": replicas} for role in ("prefill", "decode")}
    found = ScalingHarness({**roles, "scaling": {"mode": mode, "auto": {**bounds, **auto}}}, load or Load())
    found.run(60)
    return found


def flaps(found: ScalingHarness, window: float = WINDOW) -> list[tuple[float, float]]:
    """The moments at which a role went up, and down less than a window later."""
    wrong = []
    for role in (1, 2):
        changes = [(now[0], now[role] - before[role]) for before, now in pairwise(found.sizes)]
        ups = [at for at, by in changes if by > 0]
        wrong += [(up, at) for at, by in changes if by < 0 for up in ups if 0 < at - up < window]
    return wrong


def test_a_burst_takes_both_roles_up_and_its_end_takes_them_down_after_the_window() -> None:
    found = stand()
    assert found.size == (1, 1)
    found.load = BUSY
    found.run(PERIOD_SECONDS + 5)
    assert found.size[0] == 4
    found.run(200)
    up = found.size
    assert up[0] >= 4
    assert up[1] > 1, "sequences that prefill lets through need room"
    found.load = Load(arrivals=0.5)
    found.run(WINDOW - 2 * PERIOD_SECONDS)
    assert found.size == up, "the window has not passed"
    found.run(WINDOW)
    assert found.size == (1, 1)
    assert not flaps(found)


def test_each_change_is_one_event_with_its_reason_and_the_status_keeps_it() -> None:
    found = stand()
    found.load = BUSY
    found.run(120)
    told = [each for each in found.events() if each.startswith("prefill")]
    assert told == ["prefill from 1 to 4: arrivals keep 2.0 workers busy"]
    said = found.scaling["prefill"]
    assert (said["replicas"], said["reason"]) == (4, "arrivals keep 2.0 workers busy")
    since = said["since"]
    found.load.arrivals = 20.4
    found.run(100)
    assert found.scaling["prefill"]["since"] == since
    assert len([each for each in found.events() if each.startswith("prefill")]) == 1


def test_measurements_that_change_cause_no_reconciles_and_few_writes() -> None:
    found = stand(load=BUSY)
    found.run(400)
    before, looks, written = found.reconciles, found.looks, len(found.cluster.calls)
    for step in range(100):
        found.load.arrivals = 20.0 + 0.01 * (step % 7)
        found.run(1)
        found.operator.reconcile("default", "llama")  # events of other things
    assert found.looks - looks <= 2 * 100, "the canary's question and the load's"
    assert found.reconciles - before <= 3 * 100 / PERIOD_SECONDS
    assert len(found.cluster.calls) - written <= 2 * 100 / (WINDOW / 10)


def test_a_shadow_reports_and_changes_nothing() -> None:
    found = stand("Shadow")
    found.load = BUSY
    found.run(300)
    assert found.size == (1, 1)
    assert found.scaling["mode"] == "Shadow"
    assert found.scaling["prefill"]["replicas"] == 4
    assert not found.events()


def test_auto_after_a_shadow_begins_with_what_there_is() -> None:
    found = stand("Shadow", load=BUSY)
    found.run(300)
    found.load = Load(arrivals=0.5)
    found.edit(lambda spec: spec["scaling"].update(mode="Auto"))
    found.run(60)
    assert found.size == (1, 1)


@pytest.mark.parametrize("who", ["router", "prefill", "decode"])
def test_nothing_goes_down_while_somebody_is_silent(who: str) -> None:
    found = stand(load=BUSY)
    found.run(300)
    up = found.size
    found.load = Load(arrivals=0.2)
    found.silent = lambda ip: ip.startswith(who) and ip.endswith("-0")
    found.run(4 * WINDOW)
    assert found.size == up
    found.silent = lambda ip: False
    found.run(2 * WINDOW)
    assert found.size == (1, 1)


def test_a_single_lost_answer_changes_nothing() -> None:
    found = stand(load=BUSY)
    found.run(300)
    sizes = len(found.sizes)
    for _ in range(20):
        found.silent = lambda ip: True
        found.run(PERIOD_SECONDS)
        found.silent = lambda ip: False
        found.run(PERIOD_SECONDS)
    assert len(found.sizes) == sizes


def test_an_operator_that_restarts_remembers_size_and_window() -> None:
    found = stand(load=BUSY)
    found.run(300)
    up = found.size
    found.load = Load(arrivals=0.5)
    for _ in range(9):
        found.run(29)
        found.restart()
    assert found.size == up
    assert len(found.events()) == len(set(found.events()))
    found.run(WINDOW)
    assert found.size == (1, 1)
    assert not flaps(found)


def test_an_operator_that_dies_between_its_status_and_its_deed_goes_on_from_the_status() -> None:
    found = stand()
    found.load = BUSY
    apply = found.cluster.apply

    def die(item: Any) -> None:
        raise RuntimeError("dies here")

    found.cluster.apply = die  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="dies here"):
        found.run(60)
    found.cluster.apply = apply  # type: ignore[method-assign]
    assert found.size == (1, 1)
    decided = found.scaling["prefill"]["replicas"]
    assert decided == 4
    found.silent = lambda ip: True
    found.restart()
    found.run(2)
    assert found.size[0] == 4, "nobody tells it of the load, but it has decided already"


def test_a_rollout_goes_on_while_the_size_changes() -> None:
    found = stand(load=BUSY, replicas=2)
    found.run(200)
    found.edit(lambda spec: spec["model"].update(dtype="float32"))
    assert len(found._deployments("prefill")) == 2, "two revisions"
    found.load = Load(arrivals=30.0)
    found.run(600)
    assert len(found._deployments("prefill")) == len(found._deployments("decode")) == 1
    assert found.size[0] == 5
    assert found.ready("prefill") == 5
    assert not [each for each in found.events() if "prefill from 5 to" in each]


def test_a_budget_of_gpus_holds() -> None:
    found = ScalingHarness(
        {
            "scaling": {
                "mode": "Auto",
                "auto": {"prefill": {"maxReplicas": 8}, "decode": {"maxReplicas": 8}, "maxGpus": 4},
            }
        },
        Load(arrivals=40.0),
    )
    found.run(600)
    assert sum(found.size) == 4
    assert "budget is 4 GPUs" in found.scaling["prefill"]["reason"] + found.scaling["decode"]["reason"]


def test_a_paused_service_keeps_its_size() -> None:
    found = stand()
    found.cluster.services["default", "llama"]["metadata"]["annotations"] = {"serving.kvasir.dev/paused": "true"}
    found.load = BUSY
    found.run(200)
    assert found.size == (1, 1)
    assert found.scaling["prefill"]["replicas"] == 1


# To zero and back


def test_nobody_asks_so_both_go_to_zero_and_a_request_brings_both_back() -> None:
    found = stand(load=Load(arrivals=1.0), scaleToZero=ZERO)
    found.run(100)
    found.load.arrivals = 0.0
    found.run(ZERO["idleSeconds"] - 5)
    assert found.size == (1, 1)
    found.run(10)
    assert found.size == (0, 0)
    assert found.cluster.conditions()["Ready"]["status"] == "True", "routers take requests"
    assert found.cluster.conditions()["Ready"]["reason"] == "ScaledToZero"
    found.run(3000)
    found.load.arrivals = 1.0
    found.run(2)
    assert found.size == (1, 1), "within two seconds"
    assert found.events()[-2:] == [
        "prefill from 0 to 1: 1 requests wait",
        "decode from 0 to 1: nothing was measured yet",
    ]
    assert found.cluster.conditions()["Ready"]["status"] == "True"
    found.run(STARTUP + 5)
    assert found.held == 0
    assert found.cluster.conditions()["Degraded"]["status"] == "False"
    assert not flaps(found)


def test_while_all_sleeps_only_routers_are_asked() -> None:
    found = stand(replicas=0, scaleToZero=ZERO)
    assert found.size == (0, 0)
    before, calls = found.reconciles, len(found.cluster.calls)
    found.run(1000)
    assert found.reconciles == before
    assert len(found.cluster.calls) == calls


def test_roles_that_sleep_stay_so_while_routers_are_silent_and_over_a_restart() -> None:
    found = stand(replicas=0, scaleToZero=ZERO)
    found.silent = lambda ip: True
    found.restart()
    found.run(600)
    assert found.size == (0, 0)
    found.silent = lambda ip: False
    found.load.arrivals = 1.0
    found.run(2)
    assert found.size == (1, 1)


def test_who_wakes_stays_up_while_a_pair_starts_though_the_client_has_left() -> None:
    found = stand(replicas=0, scaleToZero=ZERO)
    found.load.arrivals = 1.0
    found.run(2)
    found.load.arrivals, found.held = 0.0, 0
    found.run(ZERO["idleSeconds"] - 10)
    assert found.size == (1, 1)
    found.run(WINDOW)
    assert found.size == (0, 0)


def test_more_than_one_can_be_the_fewest_while_there_are_any() -> None:
    found = stand(replicas=0, scaleToZero=ZERO, decode={"minReplicas": 3, "maxReplicas": 8})
    found.load.arrivals = 1.0
    found.run(2)
    assert found.size == (1, 3)


def test_ready_does_not_fall_while_more_workers_come() -> None:
    found = stand()
    assert found.cluster.conditions()["Ready"]["status"] == "True"
    since = found.cluster.conditions()["Ready"]["lastTransitionTime"]
    found.load = BUSY
    found.run(PERIOD_SECONDS + 2)
    assert found.ready("prefill") < found.size[0]
    conditions = found.cluster.conditions()
    assert conditions["PrefillReady"]["status"] == "False"
    assert (conditions["Ready"]["status"], conditions["Ready"]["lastTransitionTime"]) == ("True", since)
    assert conditions["Degraded"]["status"] == "False"


ARRIVALS = st.one_of(st.just(0.0), st.floats(0.1, 60.0))
MOMENTS = st.lists(
    st.tuples(ARRIVALS, st.floats(1, 500), st.sampled_from(["", "", "", "restart", "silence", "roll"])), max_size=10
)


@settings(max_examples=10, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(MOMENTS, st.booleans())
def test_whatever_happens_no_role_flaps_and_roles_sleep_together(
    moments: list[tuple[float, float, str]], sleeps: bool
) -> None:
    _play(moments, sleeps)


@pytest.mark.soak
@pytest.mark.timeout(0)
@settings(max_examples=1000, deadline=None)
@given(MOMENTS, st.booleans())
def test_whatever_happens_often_no_role_flaps(moments: list[tuple[float, float, str]], sleeps: bool) -> None:
    _play(moments, sleeps)


def _roll(place: int, spec: dict[str, Any]) -> None:
    spec["drain"] = {"deadlineSeconds": 100 + place}


def _play(moments: list[tuple[float, float, str]], sleeps: bool) -> None:
    found = stand(**({"scaleToZero": ZERO} if sleeps else {}))
    for place, (arrivals, seconds, what) in enumerate(moments):
        found.load.arrivals = arrivals
        found.silent = (lambda ip: ip.startswith("decode")) if what == "silence" else (lambda ip: False)
        if what == "restart":
            found.restart()
        if what == "roll":
            found.edit(partial(_roll, place))
        found.run(seconds)
        decided = found.scaling
        sizes = [decided[role]["replicas"] for role in ("prefill", "decode")]
        assert bool(sizes[0]) == bool(sizes[1]), place
        assert sleeps or all(sizes)
    assert not flaps(found)
