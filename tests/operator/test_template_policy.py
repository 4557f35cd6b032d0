"""What the installer lets pods be holds for every kind of pod, and wherever a service is judged."""

from typing import Any, get_args

import pytest
import yaml
from isvc_cases import FakeCluster, document
from pod_security import violations
from policy_cases import refused, templated
from typer.testing import CliRunner

from kvasir_engine.entrypoints.cli import app
from kvasir_operator.admission import parse
from kvasir_operator.admission.webhook import refusal
from kvasir_operator.pod_validation import UNRESTRICTED, Level, PodPolicy
from kvasir_operator.reconcile.reconciler import Reconciler
from kvasir_operator.render import Object, Options, render

LEVELS = get_args(Level)
LOADED: Object = {"uri": "hf://org/m", "cache": {"claimName": "models"}}

# Every kind of pod of a service: where its template is, and the specs that make one.
KINDS = {
    "prefill": ("spec.prefill.template", lambda pod: templated(pod, "prefill")),
    "decode": ("spec.decode.template", templated),
    "router": ("spec.router.template", lambda pod: templated(pod, "router")),
    "job": (
        "spec.model.cache.preload.template",
        lambda pod: {"model": {**LOADED, "cache": {**LOADED["cache"], "preload": {"template": {"spec": pod}}}}},
    ),
    "group": (
        "spec.decode.template",
        lambda pod: {"decode": {"nodes": 2, "tensorParallel": 16, "template": {"spec": pod}}},
    ),
}
ESCAPES = {
    "hostNetwork": {"hostNetwork": True},
    "volumes[0].hostPath": {"volumes": [{"name": "root", "hostPath": {"path": "/"}}]},
    "serviceAccountName": {"serviceAccountName": "another"},
    "containers[0].securityContext.privileged": {
        "containers": [
            {"name": "kvasir", "securityContext": {"privileged": True, "allowPrivilegeEscalation": True}}
        ]
    },
    "initContainers[0].securityContext.privileged": {
        "initContainers": [{"name": "a", "image": "b", "securityContext": {"privileged": True}}]
    },
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("field", ESCAPES)
def test_every_kind_of_pod_is_judged(kind: str, field: str) -> None:
    root, make = KINDS[kind]
    for level in ("restricted", "baseline"):
        assert f"{root}.spec.{field}" in refused(make(ESCAPES[field]), PodPolicy(level))
    assert not refused(make(ESCAPES[field]), UNRESTRICTED)


@pytest.mark.parametrize(
    ("pod", "field"),
    [
        ({"serviceAccountName": "default"}, "serviceAccountName"),
        ({"automountServiceAccountToken": True}, "automountServiceAccountToken"),
        (
            {"volumes": [{"name": "t", "projected": {"sources": [{"serviceAccountToken": {"path": "t"}}]}}]},
            "volumes[0].projected.sources[0].serviceAccountToken",
        ),
    ],
)
def test_a_job_has_no_token_of_the_namespaces_default_account(pod: Object, field: str) -> None:
    root, make = KINDS["job"]
    assert set(refused(make(pod), PodPolicy("baseline"))) == {f"{root}.spec.{field}"}
    assert not refused(make(pod), UNRESTRICTED)


def test_a_worker_does_not_run_as_the_router_who_may_watch_pods() -> None:
    assert refused(templated({"serviceAccountName": "llama-router"}), PodPolicy("baseline"))


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"transfer": {"fabric": "shm"}}, "spec.transfer.fabric"),
        ({"model": {"uri": "hf://a/b", "cache": {"hostPath": "/data"}}}, "spec.model.cache.hostPath"),
    ],
)
def test_a_feature_that_needs_more_is_refused_by_its_own_field(spec: Object, field: str) -> None:
    for level in ("restricted", "baseline"):
        found = refused(spec, PodPolicy(level))
        assert set(found) == {field}
        assert "more takes privileged (the chart's templatePolicy)" in found[field]
    assert not refused(spec, UNRESTRICTED)


def test_rdma_locks_memory_where_the_installer_lets_it_and_templates_do_not() -> None:
    spec: Object = {"transfer": {"fabric": "rdma", "rdmaResource": "rdma/hca"}}
    for level in LEVELS:
        assert not refused(spec, PodPolicy(level))
    found = refused(spec, PodPolicy("baseline", rdma=False))
    assert set(found) == {"spec.transfer.rdmaResource"}
    assert "IPC_LOCK" in found["spec.transfer.rdmaResource"]
    assert "allowRdma" in found["spec.transfer.rdmaResource"]
    mine = {
        "containers": [{"name": "kvasir", "securityContext": {"capabilities": {"add": ["IPC_LOCK", "NET_ADMIN"]}}}]
    }
    where = "spec.decode.template.spec.containers[0].securityContext.capabilities.add"
    assert set(refused({**spec, **templated(mine)}, PodPolicy())) == {f"{where}[0]", f"{where}[1]"}


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"model": LOADED, "router": {"auth": {"secretName": "keys"}}},
        {"decode": {"tensorParallel": 16, "nodes": 2}, "transfer": {"fabric": "tcp"}},
    ],
)
def test_what_kvasir_makes_by_itself_is_restricted(spec: Object) -> None:
    service = parse(document(**spec))
    for item in render(service, Options()):
        if item["kind"] in ("Deployment", "Job"):
            assert violations(item["spec"]["template"]["spec"]) == set(), "another table of the same standards"


BAD = templated({"hostNetwork": True})
PATH = "spec.decode.template.spec.hostNetwork"


def test_the_webhook_refuses_what_is_new_and_leaves_what_is_stored() -> None:
    assert (refusal(document(**BAD), None, lambda _: None, PodPolicy("baseline")) or "").startswith(PATH)
    assert (refusal(document(**BAD), document(), lambda _: None) or "").startswith(PATH)
    assert refusal(document(**BAD), None, lambda _: None, UNRESTRICTED) is None
    labelled = document(**BAD)
    labelled["metadata"]["labels"] = {"a": "b"}
    assert refusal(labelled, document(**BAD), lambda _: None) is None


def test_render_judges_by_the_level_that_it_is_told(tmp_path: Any) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(yaml.safe_dump(document(**BAD)))
    run = CliRunner()
    for flags in ([], ["--template-policy", "baseline"]):
        done = run.invoke(app, ["render", "-f", str(file), *flags])
        assert done.exit_code != 0
        assert PATH in done.output
    assert run.invoke(app, ["render", "-f", str(file), "--template-policy", "privileged"]).exit_code == 0
    file.write_text(yaml.safe_dump(document(transfer={"fabric": "rdma", "rdmaResource": "rdma/hca"})))
    assert run.invoke(app, ["render", "-f", str(file)]).exit_code == 0
    done = run.invoke(app, ["render", "-f", str(file), "--no-rdma"])
    assert "spec.transfer.rdmaResource" in done.output


def test_a_service_that_runs_is_left_as_it_is_when_the_policy_forbids_it() -> None:
    """As an operator's upgrade does it: nothing is deleted or rolled, the status says why nothing more is done."""
    cluster = FakeCluster(document(**BAD))

    def reconcile(policy: PodPolicy) -> list[str]:
        cluster.calls.clear()
        Reconciler(cluster, Options(template_policy=policy), lambda _: None).reconcile("default", "llama")
        cluster.settle()
        return [call for call in cluster.calls if call != "status"]

    reconcile(UNRESTRICTED)
    before = {target: item["spec"] for target, item in cluster.objects.items() if "spec" in item}
    assert before
    assert reconcile(PodPolicy()) == []
    assert {target: item["spec"] for target, item in cluster.objects.items() if "spec" in item} == before
    accepted = cluster.conditions()["Accepted"]
    assert accepted["status"] == "False"
    assert accepted["message"].startswith(PATH)
    assert any(reason == "NotAccepted" and PATH in said for (reason, _), said in cluster.events.items())
    assert reconcile(UNRESTRICTED) == [], "what runs is what is wanted: nothing is rolled"
    assert cluster.conditions()["Accepted"]["status"] == "True"


def test_a_service_that_is_new_gets_no_pod() -> None:
    cluster = FakeCluster(document(**BAD))
    Reconciler(cluster, Options(), lambda _: None).reconcile("default", "llama")
    assert not cluster.objects
    assert cluster.conditions()["Ready"]["status"] == "False"
