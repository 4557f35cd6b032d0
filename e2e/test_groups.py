"""Workers over several nodes, as groups of LeaderWorkerSets: rolled to under traffic, and refused by name.

The references of the traffic are the answers of a service whose workers are single pods.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from e2e import steps
from e2e.controlplane.cluster import Cluster
from e2e.lws import definition
from e2e.lws.running import controlled
from e2e.stage import Stage, Targets, service, set_up
from e2e.steps import Object, condition, eventually
from kvasir_operator.pods.groups import KEY_LABEL
from kvasir_operator.render.names import INDEX_LABEL, ROLE_LABEL

NAMESPACE = "groups"
TWO: Targets = {"prefill": 1, "decode": 2}


@pytest.fixture(scope="module")
def stage(cluster: Cluster) -> Iterator[Stage]:
    with controlled(cluster), set_up(cluster, service(1, 1, True), NAMESPACE, clients=1) as found:
        found.long.tokens = 400  # ranks of two cores take turns at every layer
        yield found


def groups(stage: Stage) -> dict[str, dict[str, Object]]:
    """The decode workers' pods by their place in their group, of each group."""
    found: dict[str, dict[str, Object]] = {}
    for pod in steps.pods(stage.cluster, NAMESPACE, f"{ROLE_LABEL}=decode"):
        labels = pod["metadata"]["labels"]
        if KEY_LABEL in labels:
            found.setdefault(labels[KEY_LABEL], {})[labels[INDEX_LABEL]] = pod
    return found


def test_a_rollout_to_workers_of_two_nodes_keeps_every_stream_and_its_tokens(stage: Stage) -> None:
    try:
        stage.until(lambda: stage.ready("decode") == 1, "the timeline has begun")
        stage.edit("to two nodes", service(1, 2, True, nodes=2), {"prefill": 1, "decode": 1})
        stage.until(lambda: stage.rolled(TWO), "two decode workers of two pods each")
        stage.answered()
        found = groups(stage)
        assert [set(group) for group in found.values()] == [{"0", "1"}] * 2
    finally:
        stage.settled()


def test_where_the_api_is_not_served_such_a_worker_is_refused_by_the_api_s_name(stage: Stage) -> None:
    grouped = service(0, 0, True, nodes=2)
    grouped["metadata"]["name"] = "refused"
    definition.undefine(stage.cluster)
    try:
        steps.apply(stage.cluster, grouped, namespace=NAMESPACE)

        def refused() -> Mapping[str, Any] | None:
            found = condition(stage.cluster.get("kvi", "refused", "-n", NAMESPACE), "Accepted")
            return found if found.get("status") == "False" else None

        said = eventually(refused, 120, "it is refused", stage.cluster)
        assert (
            "spec.decode.nodes: 2 takes leaderworkerset.x-k8s.io/v1, which this cluster does not serve"
            in said["message"]
        )
    finally:
        definition.define(stage.cluster)
