"""Two operators do not fight over a service: classes part them, and of two with one class the first has it."""

from datetime import UTC, datetime
from typing import Any

import pytest
from isvc_cases import FakeCluster, document

from kvasir_operator.cluster.interface import ClusterError
from kvasir_operator.cluster.lease_candidate import Record
from kvasir_operator.reconcile.ownership import GONE_SECONDS, OtherOperators
from kvasir_operator.reconcile.reconciler import Reconciler
from kvasir_operator.render import Options

NOW = datetime(2026, 1, 1, tzinfo=UTC)
FIRST = Options(operator="a/kvasir", engine_image="first")
SECOND = Options(operator="b/kvasir", engine_image="second")


def operator(cluster: FakeCluster, options: Options, alive: Any = lambda other: True) -> Reconciler:
    return Reconciler(cluster, options, lambda model: None, lambda: NOW, alive=alive)


def images(cluster: FakeCluster) -> set[str]:
    pods = [o["spec"]["template"]["spec"] for r, o in cluster.objects.items() if r.kind == "Deployment"]
    return {container["image"] for pod in pods for container in pod["containers"]}


def test_the_first_has_a_service_and_the_second_says_so_and_changes_nothing() -> None:
    cluster = FakeCluster(document())
    operator(cluster, FIRST).reconcile("default", "llama")
    assert cluster.services["default", "llama"]["status"]["operator"] == "a/kvasir"
    made = [o["metadata"]["annotations"]["serving.kvasir.dev/operator"] for o in cluster.objects.values()]
    assert made
    assert set(made) == {"a/kvasir"}
    before, calls = dict(cluster.objects), len(cluster.calls)
    for _ in range(3):
        assert operator(cluster, SECOND).reconcile("default", "llama")
    assert (cluster.objects, len(cluster.calls)) == (before, calls)
    told = [message for (reason, _), message in cluster.events.items() if reason == "OtherOperator"]
    assert told == ["b/kvasir leaves this alone: it is a/kvasir's, which has the same operator class"]
    operator(cluster, FIRST).reconcile("default", "llama")
    assert images(cluster) == {"first"}


def test_of_two_at_once_one_is_refused_before_it_has_changed_anything() -> None:
    class Raced(FakeCluster):
        def get_service(self, namespace: str, name: str) -> Any:
            found = super().get_service(namespace, name)
            self.version += 1  # another wrote after this one read
            self.services[namespace, name]["metadata"]["resourceVersion"] = f"raced-{self.version}"
            return found

    found = document()
    found["metadata"]["resourceVersion"] = "1"
    cluster = Raced(found)
    with pytest.raises(ClusterError) as error:
        operator(cluster, FIRST).reconcile("default", "llama")
    assert error.value.status == 409
    assert cluster.objects == {}


def test_what_one_leaves_behind_another_takes_over() -> None:
    cluster = FakeCluster(document())
    operator(cluster, FIRST).reconcile("default", "llama")
    same = Options(
        operator="b/kvasir", engine_image="first"
    )  # another image would be a rollout, which takes its time
    operator(cluster, same, alive=lambda other: False).reconcile("default", "llama")
    assert cluster.services["default", "llama"]["status"]["operator"] == "b/kvasir"
    assert {o["metadata"]["annotations"]["serving.kvasir.dev/operator"] for o in cluster.objects.values()} == {
        "b/kvasir"
    }


@pytest.mark.parametrize("status", [403, 0, 503])
def test_one_whose_lease_cannot_be_read_may_be_there(status: int) -> None:
    def unknown(other: str) -> bool:
        raise ClusterError(status, "no")

    cluster = FakeCluster(document())
    operator(cluster, FIRST).reconcile("default", "llama")
    calls = len(cluster.calls)
    second = operator(cluster, SECOND, alive=unknown)
    if status == 403:
        second.reconcile("default", "llama")
        assert [reason for reason, _ in cluster.events if reason == "OtherOperator"]
    else:
        with pytest.raises(ClusterError):
            second.reconcile("default", "llama")
    assert len(cluster.calls) == calls


@pytest.mark.parametrize(
    ("wanted", "own", "served"),
    [("", "", True), ("", "gpu", False), ("gpu", "", False), ("gpu", "gpu", True), ("gpu", "cpu", False)],
)
def test_an_operator_serves_its_class_and_says_nothing_of_others(wanted: str, own: str, served: bool) -> None:
    cluster = FakeCluster(document(**({"operatorClass": wanted} if wanted else {})))
    assert operator(cluster, Options(operator_class=own)).reconcile("default", "llama")
    assert bool(cluster.calls) is served
    assert cluster.events == {} or served


def test_a_lease_that_is_renewed_is_somebodys_and_one_that_is_not_is_gone() -> None:
    now = 0.0
    leases: dict[tuple[str, str], Record] = {("a", "kvasir"): Record("p", 15, "", "", version="1")}
    others = OtherOperators(lambda namespace, name: leases.get((namespace, name)), lambda: now)
    assert others("a/kvasir")
    now = GONE_SECONDS - 1
    assert others("a/kvasir")
    leases["a", "kvasir"] = Record("p", 15, "", "", version="2")
    assert others("a/kvasir")
    now += GONE_SECONDS
    assert not others("a/kvasir")
    assert not others("b/kvasir"), "there is no such Lease"
    assert not others("nonsense")
