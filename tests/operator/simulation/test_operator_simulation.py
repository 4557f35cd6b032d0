"""The real operator against a cluster on virtual time: whatever happens, it converges, touches only
its own, and keeps what pairs.

What happens to a seed: edits, rolls, roll-backs and deletions of two InferenceServices, whose workers are one pod,
or groups of two that end together and need what may be installed later; clients who come and go where sizes are the
operator's, and pods that do not tell of them; people who delete, scale and relabel what belongs to them, and who
have objects of the same names; pods that fail, flap and die; requests that are refused, delayed or lost before or
after their effect; lists from the past; watches that die; an API server that is away; operators that crash between
any two requests, upgrade, and are two at once.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sim_apply
import sim_world
from sim_world import Failed, digest, simulate

import kvasir_operator.plan
from kvasir_operator.cluster.client import Cluster
from kvasir_operator.plan import observed, workers
from kvasir_operator.plan.observed import Observed
from kvasir_operator.scaling import autoscaler
from kvasir_operator.status import derive

CHUNK = 10
CHUNKS = 3
SOAK = 10_000
SEARCHED = 300


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_when_edits_and_faults_stop_the_operator_converges(chunk: int) -> None:
    for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        simulate(seed)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_ten_thousand_seeds_converge() -> None:
    failures = []
    for seed in range(SOAK):
        try:
            simulate(seed)
        except Failed as failure:
            failures.append(failure)
    assert not failures, f"{len(failures)} of {SOAK}; the first: {failures[0]}"


def test_a_seed_replays_whatever_the_process() -> None:
    script = str(Path(sim_world.__file__))
    told = [
        subprocess.run(
            [sys.executable, script, "7"],
            env={**os.environ, "PYTHONHASHSEED": hashing},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hashing in ("1", "2")
    ]
    assert told[0] == told[1]
    assert told[0].endswith(f"digest {digest(simulate(7))}\n")


def _unfiltered(cluster: Cluster, namespace: str, name: str, uid: str) -> list[Any]:
    found = OWNED(cluster, namespace, name, uid)
    others = cluster._list("v1", "Service", "services", namespace, name)
    return found + [o for o in others if o["metadata"]["name"] not in {f["metadata"]["name"] for f in found}]


def _hopeful(*given: Any) -> Any:
    state = STATE(*given)
    groups = tuple(msgspec.structs.replace(group, ready=group.replicas) for group in state.groups)
    return msgspec.structs.replace(state, groups=groups)


def _deaf(*given: Any) -> Any:
    found = SIGNALS(*given)
    return found and msgspec.structs.replace(found, partial=False)


def _led(observed: Observed, item: Any) -> Any:
    found = SET(observed, item)
    leads = any(pod.ready and not pod.follower for pod in observed.pods if pod.group == found.name)
    return msgspec.structs.replace(found, ready=leads)


OWNED = Cluster.owned
SIGNALS = autoscaler.signals
SET = Observed._set
STATE = workers.rollout_state
#: What is put in whose place, and the seed that found it: the search begins there.
FAULTS: dict[str, tuple[Any, str, Any, int]] = {
    "what others changed is left so": (kvasir_operator.plan, "differs", lambda desired, live: False, 28),
    "no look at whose an object is": (Cluster, "foreign", lambda self, item: False, 1),
    "labels decide what is owned": (Cluster, "owned", _unfiltered, 0),
    "pods count as ready before they are": (workers, "rollout_state", _hopeful, 8),
    "conditions have an order": (derive, "same", lambda one, other: one == other, 0),
    "who is silent has nothing to do": (autoscaler, "signals", _deaf, 8),
    "followers are asked like workers": (observed, "INDEX_LABEL", "none.example/index", 5),
    "a group is ready with its leader": (Observed, "_set", _led, 10),
}


def _search(first: int) -> tuple[int, str]:
    for seed in (*range(first, SEARCHED), *range(first)):
        try:
            simulate(seed)
        except Failed as failure:
            return seed, str(failure)
    raise AssertionError(f"none of {SEARCHED} seeds finds it")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_its_seed_named(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    *replaced, first = FAULTS[fault]
    monkeypatch.setattr(*replaced)
    seed, said = _search(first)
    assert f"sim_world.py {seed}\n" in said


def test_server_side_apply_keeps_what_others_manage_and_drops_what_is_no_longer_said() -> None:
    def item(**spec: Any) -> dict[str, Any]:
        return {"apiVersion": "v1", "kind": "K", "metadata": {"name": "n"}, "spec": spec}

    ours = item(a=1, b={"c": 2}, containers=[{"name": "x", "image": "i"}])
    live, managers = sim_apply.apply({}, {}, "us", ours, force=False)
    live, managers = sim_apply.update(live, managers, "them", ("spec", "d"), 3)
    live, managers = sim_apply.update(live, managers, "them", ("spec", "a"), 9)
    with pytest.raises(sim_apply.Conflict, match="'a'"):
        sim_apply.apply(live, managers, "us", ours, force=False)
    live, managers = sim_apply.apply(live, managers, "us", item(a=1), force=True)
    assert live["spec"] == {"a": 1, "d": 3}
    assert managers == {"us": {("spec", "a")}, "them": {("spec", "d")}}
