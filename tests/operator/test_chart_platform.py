"""What a platform team sets in the chart: names, images, certificates, who may do what, alerts, and the package."""

import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from kube_schemas import VERSIONS, complaints

from kvasir_operator.admission import parse
from kvasir_operator.api import GROUP
from kvasir_operator.render import render
from kvasir_operator.render.options import Options

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts/kvasir"
CACHE = Path(os.environ.get("KVASIR_CACHE") or Path.home() / ".cache/kvasir")
AGGREGATE = "rbac.authorization.k8s.io/aggregate-to-"
MONITORED = "monitoring.alerts=true,monitoring.serviceMonitor=true,monitoring.labels.release=p"

Object = dict[str, Any]
Helm = Callable[..., str]


def program(name: str, folder: str) -> str:
    """A program of the PATH or of the cache; skips without."""
    found = shutil.which(name) or next(map(str, sorted(CACHE.glob(f"{folder}-*/{name}"))), None)
    if found is None:
        pytest.skip(f"no {name} here; `make e2e-binaries` brings one")
    return found


@pytest.fixture
def helm(tmp_path: Path) -> Helm:
    """Runs helm and returns what it prints. Raises CalledProcessError."""
    path = program("helm", "helm")

    def run(*words: str) -> str:
        env = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
        return subprocess.run([path, *words], capture_output=True, text=True, env=env, check=True).stdout

    return run


def rendered(helm: Helm, *sets: str, name: str = "kvasir", namespace: str = "system") -> list[Object]:
    values = [word for each in sets for word in ("--set", each)]
    text = helm("template", name, str(CHART), "-n", namespace, "--kube-version", "v1.30.0", *values)
    return [found for found in yaml.safe_load_all(text) if found]


def one(objects: list[Object], kind: str) -> Object:
    (found,) = [each for each in objects if each["kind"] == kind and "helm.sh/hook" not in str(each["metadata"])]
    return found


def test_two_releases_of_one_name_have_nothing_of_the_cluster_in_common(helm: Helm) -> None:
    asked = ("webhook.enabled=true", "priorityClass.create=true", MONITORED)

    def unscoped(namespace: str) -> set[tuple[str, str]]:
        return {
            (each["kind"], each["metadata"]["name"])
            for each in rendered(helm, *asked, namespace=namespace)
            if "namespace" not in each["metadata"] and each["kind"] != "CustomResourceDefinition"
        }

    one, other = unscoped("a"), unscoped("b")
    assert {"ClusterRole", "PriorityClass", "ValidatingWebhookConfiguration"} <= {kind for kind, _ in one}
    assert not one & other


@pytest.mark.parametrize(
    ("sets", "name"),
    [
        ((), "rel-kvasir"),
        (("nameOverride=llm",), "rel-llm"),
        (("fullnameOverride=serving",), "serving"),
        (("nameOverride=x", "fullnameOverride=" + "a" * 52), "a" * 52),
    ],
)
def test_names_can_be_chosen_and_agree(helm: Helm, sets: tuple[str, ...], name: str) -> None:
    objects = rendered(helm, *sets, "webhook.enabled=true", MONITORED, name="rel")
    deployment = one(objects, "Deployment")
    assert deployment["metadata"]["name"] == name
    assert f"--lease-name={name}" in deployment["spec"]["template"]["spec"]["containers"][0]["args"]
    assert all(len(each["metadata"]["name"]) <= 63 for each in objects if "namespace" in each["metadata"])


@pytest.mark.parametrize(("digest", "image"), [("", "r/o:v3"), ("sha256:" + "a" * 64, "r/o@sha256:" + "a" * 64)])
def test_a_digest_is_what_is_pulled(helm: Helm, digest: str, image: str) -> None:
    objects = rendered(helm, "image.repository=r/o", "image.tag=v3", f"image.digest={digest}")
    pods = [each["spec"]["template"]["spec"] for each in objects if each["kind"] == "Deployment"]
    pods += [each["spec"] for each in objects if each["kind"] == "Pod"]
    assert [pod["containers"][0]["image"] for pod in pods] == [image, image]


def test_a_digest_that_is_none_is_refused(helm: Helm) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        rendered(helm, "image.digest=v3")


def test_the_clusters_own_roles_reach_inference_services(helm: Helm) -> None:
    verbs: dict[str, set[tuple[str, str]]] = {"view": set(), "edit": set(), "admin": set()}
    for role in (each for each in rendered(helm) if each["kind"] == "ClusterRole"):
        for name, found in verbs.items():
            if role["metadata"]["labels"].get(AGGREGATE + name) == "true":
                for rule in role["rules"]:
                    assert rule["apiGroups"] == [GROUP]
                    found.update((resource, verb) for resource in rule["resources"] for verb in rule["verbs"])
    assert verbs["admin"] == verbs["edit"] > verbs["view"]
    assert ("inferenceservices", "get") in verbs["view"]
    assert {verb for _, verb in verbs["view"]} == {"get", "list", "watch"}
    assert {("inferenceservices", "create"), ("inferenceroles/scale", "patch")} <= verbs["edit"]
    assert not [
        each for each in verbs["admin"] if each[0].endswith("/status") and each[1] not in ("get", "list", "watch")
    ]


@pytest.mark.parametrize("replicas", [1, 2])
def test_of_two_operators_one_may_be_evicted(helm: Helm, replicas: int) -> None:
    objects = rendered(helm, f"replicas={replicas}")
    budgets = [each for each in objects if each["kind"] == "PodDisruptionBudget"]
    assert len(budgets) == replicas - 1
    for budget in budgets:
        labels = one(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
        assert budget["spec"]["selector"]["matchLabels"].items() <= labels.items()
        assert budget["spec"]["maxUnavailable"] == 1


@pytest.mark.parametrize(
    ("sets", "probe"),
    [
        ((), "httpGet"),
        (("webhook.enabled=true",), "httpGet"),
        (("webhook.enabled=true", "readinessProbe.exec.command={true}"), "exec"),
    ],
)
def test_an_operator_is_ready_by_one_handler(helm: Helm, sets: tuple[str, ...], probe: str) -> None:
    (main,) = one(rendered(helm, *sets), "Deployment")["spec"]["template"]["spec"]["containers"]
    assert set(main["readinessProbe"]) & {"httpGet", "tcpSocket", "exec", "grpc"} == {probe}
    ports = {port["name"] for port in main["ports"]}
    assert main["readinessProbe"][probe].get("port", "health") in ports


def test_the_security_context_can_be_another(helm: Helm) -> None:
    pod = one(rendered(helm, "podSecurityContext.fsGroup=7", "securityContext.runAsUser=9"), "Deployment")
    spec = pod["spec"]["template"]["spec"]
    assert spec["securityContext"]["fsGroup"] == 7
    assert spec["containers"][0]["securityContext"]["runAsUser"] == 9
    assert spec["containers"][0]["securityContext"]["readOnlyRootFilesystem"] is True


CERTIFICATES = {
    "cert-manager": ("webhook.certificate.certManager.enabled=true",),
    "another issuer": (
        "webhook.certificate.certManager.enabled=true",
        "webhook.certificate.certManager.issuerRef.kind=ClusterIssuer",
        "webhook.certificate.certManager.issuerRef.name=internal",
    ),
    "an own Secret": ("webhook.certificate.secretName=mine", "webhook.certificate.caBundle=YQ=="),
}


@pytest.mark.parametrize("given", CERTIFICATES)
def test_two_renders_are_the_same_with_a_certificate_of_others(helm: Helm, given: str) -> None:
    sets = ("webhook.enabled=true", *CERTIFICATES[given])
    objects = rendered(helm, *sets)
    assert objects == rendered(helm, *sets)
    assert "Secret" not in {each["kind"] for each in objects}
    pod = one(objects, "Deployment")["spec"]["template"]["spec"]
    mounted = pod["volumes"][0]["secret"]["secretName"]
    configuration = one(objects, "ValidatingWebhookConfiguration")
    trusted = configuration["webhooks"][0]["clientConfig"].get("caBundle")
    if given == "an own Secret":
        assert (mounted, trusted) == ("mine", "YQ==")
        return
    certificate = one(objects, "Certificate")
    assert trusted is None, "cert-manager writes it"
    injected = configuration["metadata"]["annotations"]["cert-manager.io/inject-ca-from"]
    assert injected == f"system/{certificate['metadata']['name']}"
    assert certificate["spec"]["secretName"] == mounted
    service = configuration["webhooks"][0]["clientConfig"]["service"]
    assert f"{service['name']}.{service['namespace']}.svc" in certificate["spec"]["dnsNames"]
    issuers = [each["metadata"]["name"] for each in objects if each["kind"] == "Issuer"]
    named = certificate["spec"]["issuerRef"]
    assert named["name"] in (issuers or ["internal"])
    assert bool(issuers) == (given == "cert-manager")


@pytest.mark.parametrize(
    "sets",
    [
        ("webhook.certificate.secretName=mine",),
        ("webhook.certificate.secretName=mine", "webhook.certificate.certManager.enabled=true"),
    ],
)
def test_a_certificate_that_nobody_would_trust_is_refused(helm: Helm, sets: tuple[str, ...]) -> None:
    with pytest.raises(subprocess.CalledProcessError) as error:
        rendered(helm, "webhook.enabled=true", *sets)
    assert "webhook.certificate" in error.value.stderr


def test_a_service_monitor_finds_the_operators_port(helm: Helm) -> None:
    objects = rendered(helm, MONITORED)
    monitor, service, pod = (one(objects, kind) for kind in ("ServiceMonitor", "Service", "Deployment"))
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["spec"]["endpoints"][0]["port"] == service["spec"]["ports"][0]["name"]
    template = pod["spec"]["template"]
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    ports = {port["name"] for port in template["spec"]["containers"][0]["ports"]}
    assert service["spec"]["ports"][0]["targetPort"] in ports
    rule = one(objects, "PrometheusRule")
    assert monitor["metadata"]["labels"]["release"] == rule["metadata"]["labels"]["release"] == "p"
    assert rule["spec"] == yaml.safe_load((CHART / "files/alerts.yaml").read_text())


OURS = 'namespace="n", serving_kvasir_dev_inferenceservice="llama"'
# Of each alert: series while it fires, the series that differ while it does not, and when to look.
ALERTS: dict[str, tuple[dict[str, str], dict[str, str], str]] = {
    "KvasirNoPairVerified": (
        {
            f'kvasir_router_pairs{{{OURS}, pod="r", state="verified"}}': "0x20",
            f'kvasir_router_pairs{{{OURS}, pod="r", state="failed"}}': "1x20",
        },
        {f'kvasir_router_pairs{{{OURS}, pod="r", state="verified"}}': "0x3 1x20"},
        "6m",
    ),
    "KvasirDigestFailures": (
        {'kvasir_kv_digest_failures_total{namespace="n", pod="d"}': "0 0 0 1x10"},
        {'kvasir_kv_digest_failures_total{namespace="n", pod="d"}': "1x20"},
        "5m",
    ),
    "KvasirFabricDegraded": (
        {
            'kvasir_kv_link_degraded{namespace="n", pod="d", peer="kvasir-1", transport="rdma"}': "0x20",
            'kvasir_kv_link_degraded{namespace="n", pod="d", peer="kvasir-2", transport="rdma"}': "1x20",
        },
        {'kvasir_kv_link_degraded{namespace="n", pod="d", peer="kvasir-2", transport="rdma"}': "1x2 0x20"},
        "6m",
    ),
    "KvasirFencedPages": (
        {'kvasir_kv_pages{namespace="n", pod="d", owner="fenced"}': "3x30"},
        {'kvasir_kv_pages{namespace="n", pod="d", owner="fenced"}': "3x5 0x30"},
        "16m",
    ),
    "KvasirQueueNearItsBound": (
        {
            'kvasir_requests_waiting{namespace="n", pod="d"}': "950x10",
            'kvasir_requests_waiting_limit{namespace="n", pod="d"}': "1024x10",
        },
        {'kvasir_requests_waiting_limit{namespace="n", pod="d"}': "0x10"},
        "3m",
    ),
    "KvasirPairedCapacityBelowItsBound": (
        {
            'kvasir_operator_paired_capacity_ratio{namespace="n", inferenceservice="llama", pod="o"}': "0.5x20",
            'kvasir_operator_paired_capacity_bound_ratio{namespace="n", inferenceservice="llama", pod="o"}': "1x20",
        },
        {'kvasir_operator_paired_capacity_bound_ratio{namespace="n", inferenceservice="llama", pod="o"}': "0.5x20"},
        "11m",
    ),
}


def test_every_alert_has_a_case_and_reads_metrics_that_are_there() -> None:
    rules = yaml.safe_load((CHART / "files/alerts.yaml").read_text())["groups"][0]["rules"]
    assert {rule["alert"] for rule in rules} == set(ALERTS)
    sources = "".join(p.read_text() for d in ("engine", "operator") for p in (ROOT / d).rglob("*.py"))
    for rule in rules:
        for metric in re.findall(r"\bkvasir_\w+(?=[{\[ )])", rule["expr"]):
            assert f'"{metric.removesuffix("_total")}"' in sources, metric


@pytest.mark.parametrize("alert", ALERTS)
@pytest.mark.parametrize("firing", [True, False], ids=["fires", "is silent"])
def test_an_alert_fires_when_it_should_and_only_then(tmp_path: Path, alert: str, firing: bool) -> None:
    promtool = program("promtool", "promtool")
    bad, good, at = ALERTS[alert]
    series = bad if firing else {**bad, **good}
    rules = yaml.safe_load((CHART / "files/alerts.yaml").read_text())
    for rule in rules["groups"][0]["rules"]:
        del rule["annotations"]  # what is said has no part in when
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    labels = {"namespace": "n"}
    if alert == "KvasirNoPairVerified":
        labels["serving_kvasir_dev_inferenceservice"] = "llama"
    elif alert == "KvasirPairedCapacityBelowItsBound":
        labels["inferenceservice"] = "llama"
    else:
        labels["pod"] = "d"
    severity = next(r["labels"] for r in rules["groups"][0]["rules"] if r["alert"] == alert)
    expected = [{"exp_labels": {**labels, **severity}}] if firing else []
    test = {
        "rule_files": ["rules.yaml"],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "alert_rule_test": [{"eval_time": at, "alertname": alert, "exp_alerts": expected}],
            }
        ],
    }
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(test))
    done = subprocess.run(
        [promtool, "test", "rules", "test.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_package_is_whole_and_says_what_it_is(helm: Helm, tmp_path: Path) -> None:
    helm("package", str(CHART), "--destination", str(tmp_path))
    (package,) = tmp_path.glob("kvasir-*.tgz")
    with tarfile.open(package) as found:
        names = set(found.getnames())
    for file in ("LICENSE", "Chart.yaml", "files/crd.yaml", "files/crd-roles.yaml", "files/alerts.yaml"):
        assert f"kvasir/{file}" in names
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["icon"].startswith("data:image/svg+xml;base64,")
    notes = chart["annotations"]
    assert notes["artifacthub.io/license"] == "Apache-2.0"
    kinds = [each["kind"] for each in yaml.safe_load(notes["artifacthub.io/crds"])]
    assert kinds == ["InferenceService", "InferenceRole"]
    for example in yaml.safe_load(notes["artifacthub.io/crdsExamples"]):
        assert render(parse(example), Options())


def test_the_license_is_the_apache_license_wherever_it_is_needed() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert text == (CHART / "LICENSE").read_text()
    assert "Apache License\n                           Version 2.0, January 2004" in text


def test_the_notes_example_works_without_a_token_or_a_gpu() -> None:
    notes = (CHART / "templates/NOTES.txt").read_text()
    (text,) = re.findall(r"<<YAML\n(.*?)\n  YAML", notes, flags=re.S)
    service = parse(yaml.safe_load(text))
    assert service.spec.model.uri.startswith("package://")
    assert (service.spec.prefill.device, service.spec.decode.device) == ("cpu", "cpu")


def test_images_are_built_from_what_they_copy_and_nothing_else() -> None:
    taken = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for folder in ("engine", "operator"):
        lines = (ROOT / folder / "Dockerfile").read_text().splitlines()
        copied = [line.split()[1:-1] for line in lines if line.startswith("COPY") and "--from" not in line]
        assert {name for names in copied for name in names} <= taken


def test_the_operators_pods_start_by_the_images_entry_point(helm: Helm) -> None:
    """A command would replace it, and with it the first process, which hands on signals."""
    specs = [each["spec"] for each in rendered(helm) if each["kind"] == "Pod"]
    specs += [each["spec"]["template"]["spec"] for each in rendered(helm) if each["kind"] == "Deployment"]
    assert len(specs) == 2
    assert all(
        "command" not in container and container["args"] for spec in specs for container in spec["containers"]
    )


EVERYTHING = (
    "webhook.enabled=true",
    "monitoring.namespace=m",
    MONITORED,
    "monitoring.dashboard=true",
    "priorityClass.create=true",
    "podDisruptionBudget.enabled=true",
)
ISSUERS = ("", "webhook.certificate.certManager.enabled=true")


@pytest.mark.parametrize("certificates", ISSUERS, ids=["own", "cert-manager"])
def test_the_whole_chart_is_taken_by_every_version(helm: Helm, certificates: str) -> None:
    objects = rendered(helm, *EVERYTHING, *filter(None, [certificates]))
    kinds = {item["kind"] for item in objects}
    assert {
        "ValidatingWebhookConfiguration",
        "PodDisruptionBudget",
        "PriorityClass",
        "ClusterRole",
        "RoleBinding",
        "Deployment",
        "Service",
        "CustomResourceDefinition",
    } <= kinds
    for version in VERSIONS:
        assert not [said for item in objects for said in complaints(item, version)]
