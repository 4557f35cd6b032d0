"""Workers over several nodes, as rendered: a LeaderWorkerSet of one group for each."""

import re
from typing import Any

import pytest
from isvc_cases import document, service
from typer.main import get_command

from kvasir_engine.entrypoints.cli import app as engine
from kvasir_operator.admission import parse
from kvasir_operator.api import InvalidService
from kvasir_operator.api.kv_fingerprint import fingerprint
from kvasir_operator.render import Object, Options, render

OPTIONS = Options()
TWO = {"tensorParallel": 16, "nodes": 2}
LABEL = "serving.kvasir.dev"
MOST_OF_A_LABEL = 63


def sets(role: str = "prefill", name: str = "llama", **spec: Any) -> list[Object]:
    objects = render(service(name, **spec), OPTIONS)
    return [
        o for o in objects if o["kind"] == "LeaderWorkerSet" and o["metadata"]["labels"][f"{LABEL}/role"] == role
    ]


def group(**spec: Any) -> tuple[Object, Object]:
    """The pod templates of leader and followers."""
    found = sets(**spec)[0]["spec"]["leaderWorkerTemplate"]
    return found["leaderTemplate"], found["workerTemplate"]


def main(template: Object) -> Object:
    found: Object = template["spec"]["containers"][0]
    return found


def refused(**spec: Any) -> list[str]:
    name = spec.pop("name", "llama")
    with pytest.raises(InvalidService) as error:
        parse(document(name, **spec))
    return [str(problem) for problem in error.value.problems]


def test_a_worker_over_several_nodes_is_one_group_of_a_set_of_its_own() -> None:
    found = sets(prefill={**TWO, "replicas": 3})
    revision = found[0]["metadata"]["labels"][f"{LABEL}/revision"]
    assert [o["metadata"]["name"] for o in found] == [f"llama-prefill-{revision}-{k}" for k in range(3)]
    for item in found:
        assert item["apiVersion"] == "leaderworkerset.x-k8s.io/v1"
        assert item["spec"]["replicas"] == 1
        assert item["spec"]["startupPolicy"] == "LeaderCreated"
        assert item["spec"]["leaderWorkerTemplate"]["size"] == 2
        assert item["spec"]["leaderWorkerTemplate"]["restartPolicy"] == "RecreateGroupOnPodRestart"
        (owner,) = item["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["controller"]) == ("InferenceService", True)
    kinds = {o["kind"] for o in render(service(prefill=TWO), OPTIONS) if "decode" in o["metadata"]["name"]}
    assert "Deployment" in kinds, "the other role is what it was"


def test_where_no_worker_is_wanted_a_set_of_no_groups_says_what_one_would_be() -> None:
    (found,) = sets(prefill={**TWO, "replicas": 0})
    assert found["spec"]["replicas"] == 0
    assert found["metadata"]["name"] == sets(prefill=TWO)[0]["metadata"]["name"]


def test_one_node_is_what_it_was_without_the_field() -> None:
    assert render(service(decode={"nodes": 1}), OPTIONS) == render(service(), OPTIONS)


def test_leader_and_followers_run_one_command_and_are_told_their_places_by_their_set() -> None:
    leader, follower = group(prefill=TWO)
    args = main(leader)["args"]
    assert main(follower)["args"] == args
    told = dict(zip(args[1::2], args[2::2], strict=True))
    assert told["--tensor-parallel"] == "16"
    assert told["--nnodes"] == "2"
    assert told["--node-rank"] == "$(LWS_WORKER_INDEX)"
    assert told["--dist-init-addr"] == "$(LWS_LEADER_ADDRESS):5557"
    ports = {port["name"]: port["containerPort"] for port in main(leader)["ports"]}
    assert ports == {"http": 8000, "ranks": 5557, "worker": 8443}


def test_every_flag_of_a_group_is_the_engines() -> None:
    known = {word for each in get_command(engine).commands["worker"].params for word in each.opts}  # type: ignore[attr-defined]
    given = {word for word in main(group(prefill=TWO)[0])["args"] if word.startswith("--")}
    assert given <= known


def test_each_pod_asks_for_its_own_ranks() -> None:
    spec = {"fabric": "rdma", "rdmaResource": "rdma/hca"}
    for template in group(prefill=TWO, transfer=spec):
        limits = main(template)["resources"]["limits"]
        assert limits == {"nvidia.com/gpu": "8", "rdma/hca": "8", "memory": "512Gi"}
        (shm,) = [v for v in template["spec"]["volumes"] if v["name"] == "shm"]
        assert shm["emptyDir"]["sizeLimit"] == "8192Mi"
    (whole,) = [o for o in render(service(prefill={"tensorParallel": 8}), OPTIONS) if "-prefill-" in _deployed(o)]
    alone = whole["spec"]["template"]
    assert main(alone)["resources"] == main(group(prefill=TWO)[0])["resources"]


def _deployed(item: Object) -> str:
    return item["metadata"]["name"] if item["kind"] == "Deployment" else ""


def test_a_follower_is_probed_and_is_no_worker_to_anybody() -> None:
    leader, follower = group(prefill=TWO)
    assert [port["name"] for port in main(follower)["ports"]] == ["probe"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert main(leader)[probe]["httpGet"]["port"] == "http"
        expected = {**main(leader)[probe], "httpGet": {**main(leader)[probe]["httpGet"], "port": "probe"}}
        assert main(follower)[probe] == expected
    assert "prometheus.io/scrape" in leader["metadata"]["annotations"]
    assert "annotations" not in follower["metadata"]


def test_only_the_leader_drains_and_the_others_outlast_it() -> None:
    leader, follower = group(prefill=TWO, drain={"deadlineSeconds": 100})
    assert main(leader)["lifecycle"]["preStop"]["exec"]["command"] == ["kvasir", "drain"]
    assert "lifecycle" not in main(follower)
    assert leader["spec"]["terminationGracePeriodSeconds"] == 115
    assert follower["spec"]["terminationGracePeriodSeconds"] == 145
    longer = {"spec": {"terminationGracePeriodSeconds": 900}}
    leader, follower = group(prefill={**TWO, "template": longer})
    assert leader["spec"]["terminationGracePeriodSeconds"] == 900
    assert follower["spec"]["terminationGracePeriodSeconds"] == 930


def test_the_spec_reaches_the_pods_of_leaders_and_followers() -> None:
    chosen = {
        "metadata": {"labels": {"team": "a"}},
        "spec": {
            "nodeSelector": {"pool": "h100"},
            "containers": [{"name": "kvasir", "env": [{"name": "A", "value": "b"}]}],
        },
    }
    for template in group(prefill={**TWO, "template": chosen}):
        assert template["metadata"]["labels"]["team"] == "a"
        assert template["spec"]["nodeSelector"] == {"pool": "h100"}
        assert {"name": "A", "value": "b"} in main(template)["env"]


def test_all_pods_of_a_group_have_the_labels_by_which_its_role_is_found() -> None:
    (item,) = sets(prefill=TWO)
    for template in group(prefill=TWO):
        labels = template["metadata"]["labels"]
        for name in ("inferenceservice", "role", "revision", "kv"):
            assert labels[f"{LABEL}/{name}"] == item["metadata"]["labels"][f"{LABEL}/{name}"]


def test_a_groups_pods_prefer_one_block_and_other_workers_less() -> None:
    first, second = sets(prefill={**TWO, "replicas": 2}, placement={"topologyKey": "rack"})
    for item in (first, second):
        for template in ("leaderTemplate", "workerTemplate"):
            affinity = item["spec"]["leaderWorkerTemplate"][template]["spec"]["affinity"]["podAffinity"]
            own, others = affinity["preferredDuringSchedulingIgnoredDuringExecution"]
            chosen = own["podAffinityTerm"]["labelSelector"]["matchLabels"]
            assert chosen == {"leaderworkerset.sigs.k8s.io/name": item["metadata"]["name"]}
            assert own["podAffinityTerm"]["topologyKey"] == others["podAffinityTerm"]["topologyKey"] == "rack"
            assert own["weight"] > others["weight"]
    name = f"{LABEL}/revision"
    assert first["metadata"]["labels"][name] == second["metadata"]["labels"][name]
    assert "podAffinity" not in str(sets(prefill=TWO))


def test_a_revision_is_that_of_both_templates_and_of_the_groups_size() -> None:
    def revision(**spec: Any) -> str:
        found: str = sets(**spec)[0]["metadata"]["labels"][f"{LABEL}/revision"]
        return found

    same = revision(prefill=TWO)
    assert revision(prefill={**TWO, "replicas": 5}, decode={"replicas": 3}) == same
    others = [
        revision(prefill={**TWO, "nodes": 4}),
        revision(prefill={"tensorParallel": 8, "nodes": 2}),
        revision(prefill=TWO, drain={"deadlineSeconds": 5}),
        revision(prefill=TWO, placement={"topologyKey": "rack"}),
    ]
    assert len({same, *others}) == 5


def test_nodes_do_not_change_what_the_kv_is() -> None:
    specs = [service(prefill=workers).spec for workers in ({"tensorParallel": 16, "nodes": 4}, TWO)]
    assert len({fingerprint(spec, "prefill") for spec in specs}) == 1


def test_every_name_that_is_made_of_a_sets_is_valid() -> None:
    (found,) = sets(name="a" * 28, prefill=TWO)
    name = re.sub(r"-0$", "-9999", found["metadata"]["name"])
    followers = f"{name}-0"
    assert len(f"{followers}-0123456789") <= MOST_OF_A_LABEL, "the label controller-revision-hash of a pod"
    assert refused(name="a" * 29, decode=TWO) == [
        "metadata.name: may have at most 28 characters with decode.nodes above 1: the StatefulSets of "
        "LeaderWorkerSets are named after it"
    ]
    parse(document("a" * 29, decode={"tensorParallel": 8}))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"prefill": {"tensorParallel": 4, "nodes": 3}}, "spec.prefill.nodes: 3 does not divide tensorParallel, 4"),
        (
            {"decode": {"tensorParallel": 32, "nodes": 2}},
            "spec.decode.tensorParallel: 32 / nodes 2 GPUs are more than the 8 of a node: divide the worker among "
            "more nodes",
        ),
        ({"decode": {"nodes": 0}}, "spec.decode.nodes: must be at least 1, is 0"),
        (
            {"prefill": TWO, "transfer": {"fabric": "shm"}},
            "spec.prefill.nodes: fabric shm keeps all workers on one node",
        ),
        (
            {"prefill": {**TWO, "resources": {"limits": {"nvidia.com/gpu": 16}}}},
            "spec.prefill.resources.limits[nvidia.com/gpu]: must equal tensorParallel / nodes, 8, or be left out; "
            "is 16",
        ),
    ],
)
def test_what_no_group_could_be_is_refused(spec: dict[str, Any], message: str) -> None:
    assert refused(**spec) == [message]


def test_an_autoscaler_counts_leaders_only() -> None:
    objects = render(service(prefill=TWO, scaling={"mode": "External"}), OPTIONS)
    selectors = {o["metadata"]["name"]: o["spec"]["selector"] for o in objects if o["kind"] == "InferenceRole"}
    assert selectors["llama-prefill"].endswith("role=prefill,leaderworkerset.sigs.k8s.io/worker-index=0")
    assert "worker-index" not in selectors["llama-decode"]
