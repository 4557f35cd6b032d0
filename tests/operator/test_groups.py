"""A LeaderWorkerSet's pods, as its own controller makes them."""

from typing import Any

import pytest

from kvasir_operator.api import SET_API_VERSION, SET_KIND
from kvasir_operator.pods import groups
from kvasir_operator.pods.environment import resolve
from kvasir_operator.pods.groups import GroupError
from kvasir_operator.pods.host import Host, Image
from kvasir_operator.pods.podspec import parse
from kvasir_operator.pods.volumes import Mounts
from kvasir_operator.render.names import INDEX_LABEL, SET_LABEL

ARGS = ["--nnodes", "3", "--node-rank", "$(LWS_WORKER_INDEX)", "--dist-init-addr", "$(LWS_LEADER_ADDRESS):5557"]


def template(port: str, **env: str) -> dict[str, Any]:
    container = {
        "name": "kvasir",
        "image": "engine:1",
        "args": ARGS,
        "env": [{"name": name, "value": value} for name, value in env.items()],
        "ports": [{"name": port, "containerPort": 8000}],
    }
    meta = {"labels": {"role": "decode", SET_LABEL: "a lie"}, "annotations": {"scrape": "yes"}}
    return {"metadata": meta, "spec": {"containers": [container]}}


def made(size: int = 3, uid: str = "u-set", **fields: Any) -> dict[str, Any]:
    templates = {"leaderTemplate": template("http"), "workerTemplate": template("probe"), "size": size}
    return {
        "apiVersion": SET_API_VERSION,
        "kind": SET_KIND,
        "metadata": {"name": "llm-decode-ab12-0", "namespace": "shop", **({"uid": uid} if uid else {})},
        "spec": {"replicas": 1, "leaderWorkerTemplate": {**templates, **fields}},
    }


def test_a_group_is_a_leader_and_numbered_workers_that_are_told_who_leads() -> None:
    found = groups.pods(made(), 0)
    names = [pod["metadata"]["name"] for pod in found]
    assert names == ["llm-decode-ab12-0-0", "llm-decode-ab12-0-0-1", "llm-decode-ab12-0-0-2"]
    for index, pod in enumerate(found):
        labels = pod["metadata"]["labels"]
        assert labels["role"] == "decode"
        assert labels[SET_LABEL] == "llm-decode-ab12-0"
        assert (labels[groups.GROUP_LABEL], labels[INDEX_LABEL]) == ("0", str(index))
        assert labels[groups.REVISION_LABEL] == groups.revision(made())
        assert pod["metadata"]["namespace"] == "shop"
        assert (pod["spec"]["hostname"], pod["spec"]["subdomain"]) == (names[index], "llm-decode-ab12-0")
    assert len({pod["metadata"]["labels"][groups.KEY_LABEL] for pod in found}) == 1
    ports = [pod["spec"]["containers"][0]["ports"][0]["name"] for pod in found]
    assert ports == ["http", "probe", "probe"]
    annotations = [pod["metadata"]["annotations"] for pod in found]
    assert annotations[0] == {"scrape": "yes", groups.SIZE_ANNOTATION: "3"}
    assert annotations[1] == {**annotations[0], groups.LEADER_ANNOTATION: names[0]}


def test_each_container_s_arguments_name_its_own_number_and_the_leader() -> None:
    host = Host(images={"engine:1": Image(("worker",))}, environ={})
    for index, pod in enumerate(groups.pods(made(), 0)):
        parsed = parse(pod)
        launch = resolve(parsed.containers[0], parsed, "10.0.0.9", host, Mounts({}))
        address = "llm-decode-ab12-0-0.llm-decode-ab12-0.shop:5557"
        expected = ("--nnodes", "3", "--node-rank", str(index), "--dist-init-addr", address)
        assert launch.argv == ("worker", *expected)
        assert launch.env["LWS_GROUP_SIZE"] == "3"


def test_what_a_template_says_of_the_same_variables_gives_way_and_may_use_them() -> None:
    own = template("http", LWS_WORKER_INDEX="7", MINE="node $(LWS_WORKER_INDEX)")
    leader, worker = groups.pods(made(2, leaderTemplate=None, workerTemplate=own), 0)
    for pod, index in ((leader, "0"), (worker, "1")):
        env = pod["spec"]["containers"][0]["env"]
        assert [entry["name"] for entry in env] == [*env_names(), "MINE"]
        parsed = parse(pod)
        launch = resolve(parsed.containers[0], parsed, "", Host(any_image=Image(("w",)), environ={}), Mounts({}))
        assert launch.env["MINE"] == f"node {index}"
    assert own["spec"]["containers"][0]["env"][0] == {"name": "LWS_WORKER_INDEX", "value": "7"}, "not changed"


def env_names() -> list[str]:
    return [groups.LEADER_ADDRESS, groups.GROUP_SIZE, groups.WORKER_INDEX]


def test_the_set_owns_the_leader_and_the_leader_its_workers() -> None:
    leader, worker, _ = groups.pods(made(), 0)
    (owner,) = leader["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["uid"], owner["controller"]) == ("LeaderWorkerSet", "u-set", True)
    assert "ownerReferences" not in worker["metadata"]
    stored = {**leader, "metadata": {**leader["metadata"], "uid": "u-leader"}}
    (owner,) = groups.owned_by(worker, stored)["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"], owner["uid"]) == ("Pod", "llm-decode-ab12-0-0", "u-leader")
    assert owner["blockOwnerDeletion"], "a deletion in the foreground waits for the workers"
    assert "ownerReferences" not in groups.pods(made(uid=""), 0)[0]["metadata"]


def test_groups_of_one_set_are_apart_and_a_changed_template_is_another_revision() -> None:
    first, second = groups.pods(made(), 0)[0], groups.pods(made(), 1)[0]
    assert second["metadata"]["name"] == "llm-decode-ab12-0-1"
    assert first["metadata"]["labels"][groups.KEY_LABEL] != second["metadata"]["labels"][groups.KEY_LABEL]
    assert groups.revision(made()) != groups.revision(made(workerTemplate=template("other")))
    many = {**made(), "spec": {**made()["spec"], "replicas": 4}}
    assert groups.revision(many) == groups.revision(made()), "more groups of the same"
    assert (groups.replicas(many), groups.size(many)) == (4, 3)


def test_a_set_that_says_least_is_one_pod() -> None:
    item = made(uid="")
    item["spec"] = {"leaderWorkerTemplate": {"workerTemplate": {"spec": {"containers": [{"name": "a"}]}}}}
    (pod,) = groups.pods(item, 0)
    assert groups.replicas(item) == 1
    assert pod["metadata"]["labels"][INDEX_LABEL] == "0"


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ({"startupPolicy": "LeaderReady"}, "spec.startupPolicy LeaderReady"),
        ({"networkConfig": {"subdomainPolicy": "UniquePerReplica"}}, "subdomainPolicy UniquePerReplica"),
        ({"leaderWorkerTemplate": {"restartPolicy": "None"}}, "restartPolicy None"),
        ({"leaderWorkerTemplate": {"subGroupPolicy": {"subGroupSize": 2}}}, "subGroupPolicy"),
        ({"leaderWorkerTemplate": {"volumeClaimTemplates": [{}]}}, "volumeClaimTemplates"),
    ],
)
def test_what_would_make_other_pods_is_refused_by_name(spec: dict[str, Any], named: str) -> None:
    item = made()
    item["spec"] = {**item["spec"], **spec, "leaderWorkerTemplate": {
        **item["spec"]["leaderWorkerTemplate"], **spec.get("leaderWorkerTemplate", {})
    }}  # fmt: skip
    with pytest.raises(GroupError, match=named):
        groups.pods(item, 0)


def test_exclusive_placement_is_refused_by_name() -> None:
    item = made()
    item["metadata"]["annotations"] = {"leaderworkerset.sigs.k8s.io/exclusive-topology": "rack"}
    with pytest.raises(GroupError, match="exclusive-topology"):
        groups.pods(item, 0)


def test_the_service_publishes_pods_that_are_not_ready() -> None:
    found = groups.service(made())
    assert found["metadata"]["name"] == "llm-decode-ab12-0"
    assert found["spec"] == {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": {SET_LABEL: "llm-decode-ab12-0"},
    }
