"""The chart and the images install what the tests run."""

import base64
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.x509 import DNSName, SubjectAlternativeName, load_pem_x509_certificate
from pod_security import violations
from typer.main import get_command

from kvasir_operator.__main__ import app
from kvasir_operator.api import GROUP, PLURAL
from kvasir_operator.crd import crd

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts/kvasir"

Template = Callable[..., list[dict[str, Any]]]


def _helm() -> str | None:
    cache = Path(os.environ.get("KVASIR_CACHE") or Path.home() / ".cache/kvasir")
    built = sorted(cache.glob("helm-*/helm"))
    return shutil.which("helm") or (str(built[0]) if built else None)


@pytest.fixture
def template(tmp_path: Path) -> Template:
    """Renders the chart with `--set` arguments. Raises CalledProcessError."""
    helm = _helm()
    if helm is None:
        pytest.skip("no helm here; `make e2e-binaries` brings one")

    def run(*sets: str, tests: bool = False, version: str = "v1.30.0") -> list[dict[str, Any]]:
        command = [helm, "template", "kvasir", str(CHART), "--namespace", "system", "--kube-version", version]
        command += [word for value in sets for word in ("--set", value)]
        env = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
        found = [found for found in yaml.safe_load_all(done.stdout) if found]
        return [o for o in found if tests == ("helm.sh/hook" in o["metadata"].get("annotations", {}))]

    return run


def kinds(objects: list[dict[str, Any]]) -> list[str]:
    return sorted(o["kind"] for o in objects)


def operator_args(objects: list[dict[str, Any]]) -> list[str]:
    (deployment,) = [o for o in objects if o["kind"] == "Deployment"]
    args: list[str] = deployment["spec"]["template"]["spec"]["containers"][0]["args"]
    return args


def test_all_namespaces_by_default(template: Template) -> None:
    objects = template()
    assert kinds(objects) == [
        *["ClusterRole"] * 4,
        "ClusterRoleBinding",
        "CustomResourceDefinition",
        "CustomResourceDefinition",
        "Deployment",
        "PodDisruptionBudget",
        "Role",
        "RoleBinding",
        "ServiceAccount",
    ]
    assert "--all-namespaces" in operator_args(objects)
    (binding,) = [o for o in objects if o["kind"] == "ClusterRoleBinding"]
    (account,) = [o for o in objects if o["kind"] == "ServiceAccount"]
    (subject,) = binding["subjects"]
    assert (subject["name"], subject["namespace"]) == (account["metadata"]["name"], "system")


def test_chosen_namespaces_get_roles_and_the_cluster_none(template: Template) -> None:
    objects = template("watchNamespaces={a,b}", "rbac.aggregateClusterRoles=false")
    assert kinds(objects) == [
        "CustomResourceDefinition",
        "CustomResourceDefinition",
        "Deployment",
        "PodDisruptionBudget",
        *["Role"] * 3,
        *["RoleBinding"] * 3,
        "ServiceAccount",
    ]
    found = {(o["metadata"]["namespace"], o["metadata"]["name"]) for o in objects if o["kind"] == "Role"}
    assert found == {("a", "kvasir"), ("b", "kvasir"), ("system", "kvasir-leader")}
    assert {"--namespace=a", "--namespace=b"} <= set(operator_args(objects))
    assert "--all-namespaces" not in operator_args(objects)


def test_the_flags_are_ones_that_the_operator_has(template: Template) -> None:
    run = get_command(app).commands["run"]  # type: ignore[attr-defined]
    known = {option for parameter in run.params for option in (*parameter.opts, *parameter.secondary_opts)}
    others = template(
        "watchNamespaces={a}",
        "monitoring.namespace=m",
        "monitoring.podMonitors=false",
        "webhook.enabled=true",
        "templatePolicy=baseline",
        "allowRdma=false",
    )
    for objects in (template(), others):
        command, *flags = operator_args(objects)
        assert command == "run"
        assert {flag.split("=")[0] for flag in flags} <= known


@pytest.mark.parametrize(
    ("sets", "flags"),
    [
        ((), {"--template-policy=restricted"}),
        (("templatePolicy=privileged",), {"--template-policy=privileged"}),
        (("templatePolicy=baseline", "allowRdma=false"), {"--template-policy=baseline", "--no-rdma"}),
    ],
)
def test_the_installer_says_what_pods_may_be(template: Template, sets: tuple[str, ...], flags: set[str]) -> None:
    found = {flag for flag in operator_args(template(*sets)) if "policy" in flag or "rdma" in flag}
    assert found == flags


def test_a_level_that_is_none_is_refused(template: Template) -> None:
    with pytest.raises(subprocess.CalledProcessError) as error:
        template("templatePolicy=open")
    assert "templatePolicy" in error.value.stderr


def test_helm_test_asks_for_a_sign_of_life(template: Template) -> None:
    (pod,) = template(tests=True)
    (container,) = pod["spec"]["containers"]
    command, *flags = container["args"]
    context = get_command(app).commands[command].make_context(command, flags)  # type: ignore[attr-defined]
    assert (context.params["own_namespace"], context.params["lease_name"]) == ("system", "kvasir")
    deployment = next(o for o in template() if o["kind"] == "Deployment")
    selector = deployment["spec"]["selector"]["matchLabels"]
    assert not selector.items() <= pod["metadata"]["labels"].items(), "it is no operator"


def test_the_operators_own_pods_are_restricted(template: Template) -> None:
    (deployment,) = [o for o in template("webhook.enabled=true") if o["kind"] == "Deployment"]
    (test,) = template(tests=True)
    assert violations(deployment["spec"]["template"]["spec"]) == set()
    assert violations(test["spec"]) == set()


def test_the_webhook_is_served_where_the_api_server_looks_for_it(template: Template) -> None:
    objects = {o["kind"]: o for o in template("webhook.enabled=true", "watchNamespaces={a,b}")}
    (hook,) = objects["ValidatingWebhookConfiguration"]["webhooks"]
    (rule,) = hook["rules"]
    assert (rule["apiGroups"], rule["resources"]) == ([GROUP], [PLURAL])
    assert hook["failurePolicy"] == "Ignore"
    (expression,) = hook["namespaceSelector"]["matchExpressions"]
    assert expression["values"] == ["a", "b"]
    config, service, secret = hook["clientConfig"], objects["Service"], objects["Secret"]
    assert config["service"]["name"] == service["metadata"]["name"]
    assert config["service"]["path"] == "/validate"
    pod = objects["Deployment"]["spec"]["template"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    ports = {p["name"]: p["containerPort"] for p in pod["spec"]["containers"][0]["ports"]}
    assert ports[service["spec"]["ports"][0]["targetPort"]] == 9443
    (volume,) = pod["spec"]["volumes"]
    assert volume["secret"]["secretName"] == secret["metadata"]["name"]
    assert config["caBundle"] == secret["data"]["ca.crt"]
    authority, own = (load_pem_x509_certificate(base64.b64decode(secret["data"][n])) for n in ("ca.crt", "tls.crt"))
    own.verify_directly_issued_by(authority)
    names = own.extensions.get_extension_for_class(SubjectAlternativeName).value.get_values_for_type(DNSName)
    assert f"{service['metadata']['name']}.system.svc" in names
    assert "Secret" not in {o["kind"] for o in template()}


@pytest.mark.parametrize(("version", "rules"), [("v1.36.1", True), ("v1.25.0", True), ("v1.20.2", False)])
def test_the_crd_has_rules_where_the_api_server_knows_them(template: Template, version: str, rules: bool) -> None:
    definitions = [o for o in template(version=version) if o["kind"] == "CustomResourceDefinition"]
    found, roles = sorted(definitions, key=lambda o: o["spec"]["names"]["kind"] == "InferenceRole")
    assert roles["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    assert "scale" in roles["spec"]["versions"][0]["subresources"]
    assert found["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
    assert found == crd(rules)
    assert not [o for o in template("crds.install=false") if o["kind"] == "CustomResourceDefinition"]


def test_what_is_not_asked_for_is_not_installed(template: Template) -> None:
    asked = template("monitoring.dashboard=true", "priorityClass.create=true", "priorityClass.name=p")
    assert set(kinds(asked)) - set(kinds(template())) == {"ConfigMap", "PriorityClass"}
    (found,) = [o for o in asked if o["kind"] == "PriorityClass"]
    assert found["metadata"]["name"] == "p"
    (dashboard,) = [o for o in asked if o["kind"] == "ConfigMap"]
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(dashboard["data"]["kvasir.json"]) == json.loads(
        (CHART / "dashboards/kvasir.json").read_text()
    )


def test_operators_elect_a_leader_by_a_lease_that_they_may_write(template: Template) -> None:
    objects = template()
    (name,) = [flag.split("=")[1] for flag in operator_args(objects) if flag.startswith("--lease-name=")]
    assert "--leader-elect" in operator_args(objects)
    (role,) = [o for o in objects if o["kind"] == "Role"]
    assert role["metadata"]["namespace"] == "system"
    (create, others, *_) = role["rules"]
    assert create == {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["create"]}
    assert others["resourceNames"] == [name]
    (deployment,) = [o for o in objects if o["kind"] == "Deployment"]
    assert deployment["spec"]["replicas"] == 2


def test_values_reach_the_pod(template: Template) -> None:
    objects = template("engine.image=r/e:2", "image.repository=r/o", "image.tag=v3", "nodeSelector.pool=a")
    (deployment,) = [o for o in objects if o["kind"] == "Deployment"]
    pod = deployment["spec"]["template"]["spec"]
    assert pod["containers"][0]["image"] == "r/o:v3"
    assert "--engine-image=r/e:2" in operator_args(objects)
    assert pod["nodeSelector"] == {"pool": "a"}
    assert pod["securityContext"]["runAsNonRoot"] is True
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()


@pytest.mark.parametrize(
    "mistake", ["image.tagg=1", "watchNamespaces={Not A Name}", "engine.image.name=a", "replicas=two", "replica=1"]
)
def test_values_that_mean_nothing_are_refused(template: Template, mistake: str) -> None:
    with pytest.raises(subprocess.CalledProcessError) as error:
        template(mistake)
    assert "schema" in error.value.stderr


def test_every_value_is_in_the_schema_and_every_schema_property_in_the_values() -> None:
    def keys(values: Any, schema: Any, path: str) -> None:
        assert set(values) == set(schema["properties"]) - {"global"}, path
        for name, value in values.items():
            below = schema["properties"][name]
            ours = isinstance(value, dict) and below.get("additionalProperties") is False
            if ours and name not in ("resources", "issuerRef"):  # what others define is not repeated
                keys(value, below, f"{path}.{name}")

    values = yaml.safe_load((CHART / "values.yaml").read_text())
    keys(values, json.loads((CHART / "values.schema.json").read_text()), "")


def pip_steps(text: str) -> list[str]:
    """The pip install commands of a Dockerfile or a Makefile, in order, without their decoration."""
    found = re.findall(r"pip install ((?:--quiet )?-c constraints\.txt [^\n]+)", text)
    return [step.replace("--quiet ", "").strip() for step in found]


def test_the_images_are_installed_by_the_steps_that_the_tests_ran() -> None:
    tested = pip_steps((ROOT / "Makefile").read_text())
    assert tested[0] == "-c constraints.txt torch"
    for folder in ("engine", "operator"):  # what is locked has those versions: tests/layout/test_supply_chain.py
        assert pip_steps((ROOT / folder / "Dockerfile").read_text()) == []
    for extra in ("engine", "operator"):
        assert re.search(rf"\.\[[^\]]*\b{extra}\b", tested[1]), f"the tests install the extra {extra}"


@pytest.mark.parametrize(("folder", "program"), [("engine", "kvasir"), ("operator", "kvasir-operator")])
def test_images_run_their_program_as_an_ordinary_user(folder: str, program: str) -> None:
    lines = (ROOT / folder / "Dockerfile").read_text().splitlines()
    assert "USER 65532:65532" in lines
    assert lines[-1] == f'ENTRYPOINT ["tini", "--", "{program}"]'
    copied = [line.split()[1:-1] for line in lines if line.startswith("COPY") and "--from" not in line]
    for source in (name for names in copied for name in names):
        assert (ROOT / source).exists()
