"""Certificates of pods that cert-manager issues: what it is asked for, what is said of it, and what the chart sets.

cert-manager itself does not run here: a stand-in says of Certificates what it would. The schema below is of its
API's documentation (https://cert-manager.io/docs/reference/api-docs/): fields that are used, and no others.
"""

import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from isvc_cases import FakeCluster, deployments, document
from test_chart_platform import Helm, helm, one, rendered  # noqa: F401
from typer.testing import CliRunner

from kvasir_engine.tls import Credentials
from kvasir_operator.__main__ import app
from kvasir_operator.certificates import files, new_authority, new_leaf
from kvasir_operator.plan.observed import Reference
from kvasir_operator.reconcile.reconciler import FAILED_SECONDS, Reconciler
from kvasir_operator.render import Issuer, Object, Options
from kvasir_operator.render.issued import API_VERSION, KIND

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ROLES = ("prefill", "decode", "router")
_TEXT = {"type": "string", "minLength": 1}
_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_DURATION = {"type": "string", "pattern": "^[0-9]+h$"}


def _closed(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": properties, "required": list(required)}


SPEC = _closed(
    {
        "secretName": _TEXT,
        "secretTemplate": _closed({"labels": _TEXTS, "annotations": _TEXTS}),
        "uris": {"type": "array", "items": {"type": "string", "format": "uri"}, "minItems": 1},
        "duration": _DURATION,
        "renewBefore": _DURATION,
        "privateKey": _closed(
            {
                "algorithm": {"enum": ["RSA", "ECDSA", "Ed25519"]},
                "encoding": {"enum": ["PKCS1", "PKCS8"]},
                "rotationPolicy": {"enum": ["Never", "Always"]},
                "size": {"type": "integer"},
            }
        ),
        "usages": {
            "type": "array",
            "uniqueItems": True,
            "items": {
                "enum": [
                    *("signing", "digital signature", "content commitment", "key encipherment", "key agreement"),
                    *("data encipherment", "cert sign", "crl sign", "encipher only", "decipher only", "any"),
                    *("server auth", "client auth", "code signing", "email protection", "s/mime"),
                    *("ipsec end system", "ipsec tunnel", "ipsec user", "timestamping", "ocsp signing"),
                    *("microsoft sgc", "netscape sgc"),
                ]
            },
        },
        "issuerRef": _closed({"name": _TEXT, "kind": _TEXT, "group": _TEXT}, "name"),
    },
    "secretName",
    "issuerRef",
)


class World:
    """A service, and an operator that has an issuer."""

    def __init__(self, **spec: Any) -> None:
        self.cluster = FakeCluster(document(**spec))
        self.again: list[float] = []
        self.issuer: Issuer | None = Issuer("internal", "ClusterIssuer")

    def reconcile(self) -> None:
        options = Options(issuer=self.issuer)
        Reconciler(
            self.cluster,
            options,
            lambda model: None,
            lambda: NOW,
            requeue_after=lambda namespace, name, seconds: self.again.append(seconds),
        ).reconcile("default", "llama")

    def certificates(self) -> dict[str, Object]:
        return {
            item["metadata"]["labels"]["serving.kvasir.dev/role"]: item
            for reference, item in self.cluster.objects.items()
            if reference.kind == KIND
        }

    def says(self, ready: str, message: str = "", ends: str = "2026-01-31T00:00:00Z", *roles: str) -> None:
        """cert-manager judges the Certificates of these roles, by default of all."""
        for role, item in self.certificates().items():
            if role in (roles or ROLES):
                condition = {"type": "Ready", "status": ready, "reason": "R", "message": message}
                status = {"conditions": [condition], "notAfter": ends}
                self.cluster.objects[Reference(API_VERSION, KIND, item["metadata"]["name"])] = {
                    **item,
                    "status": status,
                }

    def condition(self) -> Object:
        found: Object = self.cluster.conditions()["CertificatesReady"]
        return found


def test_each_role_has_a_certificate_for_the_secret_that_its_pods_mount() -> None:
    world = World()
    world.reconcile()
    found = world.certificates()
    assert set(found) == set(ROLES)
    for role, item in found.items():
        jsonschema.validate(item["spec"], SPEC, format_checker=jsonschema.FormatChecker())
        assert item["apiVersion"] == "cert-manager.io/v1"
        assert item["metadata"]["ownerReferences"][0]["kind"] == "InferenceService"
        spec = item["spec"]
        assert spec["uris"] == [f"spiffe://kvasir/ns/default/inferenceservice/llama/role/{role}"]
        assert spec["issuerRef"] == {"name": "internal", "kind": "ClusterIssuer", "group": "cert-manager.io"}
        assert spec["secretTemplate"]["labels"]["serving.kvasir.dev/inferenceservice"] == "llama"
        pods = deployments(list(world.cluster.objects.values()))[role]["spec"]["template"]["spec"]
        (volume,) = [each for each in pods["volumes"] if each["name"] == "tls"]
        assert volume["secret"]["secretName"] == spec["secretName"]
    assert not world.cluster.secrets, "the operator writes none"


def test_what_is_asked_for_is_what_the_engine_believes(tmp_path: Path) -> None:
    world = World()
    world.reconcile()
    ca = new_authority(datetime.now(UTC))
    for role, item in world.certificates().items():
        (uri,) = item["spec"]["uris"]
        folder = tmp_path / role
        folder.mkdir()
        for name, content in files(new_leaf(ca, uri, datetime.now(UTC)), [ca]).items():
            (folder / name).write_bytes(content)
        assert Credentials(folder).identity.role == role
        assert {"server auth", "client auth"} <= set(item["spec"]["usages"]), "workers are both to each other"


def test_the_condition_says_what_cert_manager_says_and_the_service_is_looked_at_again() -> None:
    world = World()
    world.reconcile()
    assert (world.condition()["status"], world.condition()["reason"]) == ("False", "NotIssued")
    assert FAILED_SECONDS in world.again
    world.says("True")
    world.says("False", "the issuer takes no URIs", "", "decode")
    world.reconcile()
    assert "the issuer takes no URIs" in world.condition()["message"]
    assert "llama-decode-tls-" in world.condition()["message"]
    world.says("True")
    world.says("True", "", "2026-01-30T00:00:00Z", "prefill")
    world.again.clear()
    world.reconcile()
    assert world.condition()["status"] == "True"
    assert "ClusterIssuer internal, valid until 2026-01-30" in world.condition()["message"]
    assert "certificates" not in world.cluster.services["default", "llama"]["status"]


def test_without_cert_manager_the_condition_says_so_and_the_service_is_looked_at_again() -> None:
    world = World()
    world.cluster.unserved.add(KIND)
    world.reconcile()
    assert not world.certificates()
    assert world.condition()["reason"] == "CertManagerMissing"
    assert "ClusterIssuer internal" in world.condition()["message"]
    assert FAILED_SECONDS in world.again
    world.cluster.unserved.clear()
    world.reconcile()
    assert set(world.certificates()) == set(ROLES)


def test_no_certificate_is_asked_for_without_encryption_and_those_that_are_there_go() -> None:
    world = World()
    world.reconcile()
    world.cluster.services["default", "llama"]["spec"]["transfer"] = {"encryption": "Off"}
    for _ in range(4):
        world.cluster.settle()
        world.reconcile()
    assert not world.certificates()
    assert "CertificatesReady" not in world.cluster.conditions()


def test_a_spec_that_is_refused_takes_no_certificate_away() -> None:
    world = World()
    world.reconcile()
    world.cluster.services["default", "llama"]["spec"]["prefill"] = {"replicas": -1}
    world.reconcile()
    assert set(world.certificates()) == set(ROLES)


@pytest.mark.parametrize("kind", ["", "ClusterIssuer"])
def test_the_chart_gives_the_operator_an_issuer_and_takes_its_secrets_away(helm: Helm, kind: str) -> None:  # noqa: F811
    sets = ["certificates.issuerRef.name=internal"]
    objects = rendered(helm, *sets, *([f"certificates.issuerRef.kind={kind}"] if kind else []))
    args = one(objects, "Deployment")["spec"]["template"]["spec"]["containers"][0]["args"]
    issuer = [each for each in args if each.startswith("--issuer")]
    assert issuer == ["--issuer-name=internal", *([f"--issuer-kind={kind}"] if kind else [])]
    assert not [each for each in args if each.startswith("--authority")]
    resources = [r for o in objects for rule in o.get("rules") or () for r in rule["resources"]]
    assert "certificates" in resources
    assert "secrets" not in resources
    own = [r for o in rendered(helm) for rule in o.get("rules") or () for r in rule["resources"]]
    assert "secrets" in own
    assert "certificates" not in own


@pytest.mark.parametrize(
    "wrong", ["certificates.issuerRef.kind=ClusterIssuer", "certificates.issuerRef.nme=x", "certificates.issuer=x"]
)
def test_the_chart_refuses_an_issuer_that_is_none(helm: Helm, wrong: str) -> None:  # noqa: F811
    with pytest.raises(subprocess.CalledProcessError) as error:
        rendered(helm, wrong)
    assert "certificates" in error.value.stderr


def test_an_issuers_kind_without_its_name_is_refused() -> None:
    found = CliRunner().invoke(app, ["run", "--all-namespaces", "--issuer-kind", "ClusterIssuer"])
    assert found.exit_code == 2
    assert "say --issuer-name" in found.output
