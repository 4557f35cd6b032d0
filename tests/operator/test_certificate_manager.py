"""A service's certificates in its reconciles: what is put into which Secret, and what is said of it."""

import base64
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from isvc_cases import FakeCluster, document, service

from kvasir_operator.certificates import Authority, new_authority
from kvasir_operator.certificates.renewal import RENEW_AFTER, SPREAD
from kvasir_operator.cluster.authority_store import authorities
from kvasir_operator.cluster.interface import ClusterError
from kvasir_operator.pod_validation import UNRESTRICTED
from kvasir_operator.reconcile.certificates import AUTHORITY_SECONDS, CertificateManager
from kvasir_operator.reconcile.reconciler import Reconciler
from kvasir_operator.render import Object, Options, render
from kvasir_operator.render.names import CERTIFICATES, PAUSED

NOW = datetime(2026, 1, 1, tzinfo=UTC)


class Store:
    """The operator's own Secret, in memory."""

    def __init__(self) -> None:
        self.found: list[Authority] = []
        self.version = 0
        self.error: ClusterError | None = None
        self.others: list[Authority] = []  # what somebody else writes first

    def read(self) -> tuple[list[Authority], str]:
        if self.error:
            raise self.error
        return list(self.found), str(self.version)

    def write(self, found: list[Authority], version: str) -> bool:
        if self.others:
            self.found, self.version = [self.others.pop()], self.version + 1
        if version != str(self.version):
            return False
        self.found, self.version = list(found), self.version + 1
        return True


class World:
    """One service, its operator and a clock."""

    def __init__(self, **spec: Any) -> None:
        self.cluster = FakeCluster(document(**spec))
        self.store = Store()
        self.now = NOW
        self.begin()

    def begin(self) -> None:
        """A new process."""
        manager = CertificateManager(self.cluster, self.store, lambda: self.now, lambda: self.now.timestamp())
        self.operator = Reconciler(
            self.cluster,
            Options(template_policy=UNRESTRICTED),
            lambda model: None,
            lambda: self.now,
            certificates=manager,
        )

    def reconcile(self, after: timedelta = timedelta(0)) -> None:
        self.now += after
        self.operator.reconcile("default", "llama")

    @property
    def service(self) -> Object:
        return self.cluster.services["default", "llama"]

    @property
    def status(self) -> Object:
        found: Object = self.service["status"]
        return found

    def secret(self, role: str) -> Object:
        (found,) = [item for name, item in self.cluster.secrets.items() if name.startswith(f"llama-{role}-tls")]
        return found

    def certificate(self, role: str) -> x509.Certificate:
        return x509.load_pem_x509_certificate(base64.b64decode(self.secret(role)["data"]["tls.crt"]))

    def trusted(self, role: str) -> list[x509.Certificate]:
        return x509.load_pem_x509_certificates(base64.b64decode(self.secret(role)["data"]["ca.crt"]))

    def issued(self) -> int:
        """How often certificates were issued."""
        return sum(call.startswith("secret llama-router") for call in self.cluster.calls)


def test_each_role_gets_its_own_name_in_the_secret_that_its_pods_mount() -> None:
    world = World()
    world.reconcile()
    for role in ("prefill", "decode", "router"):
        names = world.certificate(role).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.UniformResourceIdentifier) == [
            f"spiffe://kvasir/ns/default/inferenceservice/llama/role/{role}"
        ]
        secret = world.secret(role)
        assert secret["type"] == "kubernetes.io/tls"
        assert secret["metadata"]["ownerReferences"][0]["uid"] == world.service["metadata"]["uid"]
        (deployment,) = [
            o
            for r, o in world.cluster.objects.items()
            if r.name.startswith(f"llama-{role}") and r.kind == "Deployment"
        ]
        (volume,) = [v for v in deployment["spec"]["template"]["spec"]["volumes"] if v["name"] == "tls"]
        assert volume["secret"]["secretName"] == secret["metadata"]["name"]
    assert world.cluster.conditions()["CertificatesReady"]["status"] == "True"


def test_secrets_are_there_before_the_pods_that_mount_them() -> None:
    world = World()
    world.reconcile()
    calls = world.cluster.calls
    first = next(index for index, call in enumerate(calls) if call.startswith("apply Deployment"))
    assert all(index < first for index, call in enumerate(calls) if call.startswith("secret"))


def test_certificates_are_renewed_long_before_they_end_and_no_pod_is_rolled() -> None:
    world = World()
    world.reconcile()
    world.cluster.settle()
    world.reconcile()
    objects, before = dict(world.cluster.objects), world.certificate("decode")
    world.reconcile(RENEW_AFTER - timedelta(minutes=1))
    assert world.issued() == 1
    world.reconcile(timedelta(minutes=1))
    assert world.issued() == 2
    assert world.certificate("decode").not_valid_after_utc > before.not_valid_after_utc
    assert before.not_valid_after_utc - world.now == timedelta(days=20)
    assert world.cluster.objects == objects
    assert [reason for reason, _ in world.cluster.events].count("CertificatesRenewed") == 1
    world.reconcile()
    assert world.issued() == 2


def test_a_new_authority_is_believed_before_it_signs() -> None:
    world = World()
    world.reconcile()
    first = world.store.found[0]
    second = new_authority(world.now + timedelta(minutes=1))
    world.store.found.append(second)
    world.reconcile(timedelta(seconds=AUTHORITY_SECONDS))
    assert len(world.trusted("router")) == 2
    assert world.status["certificates"]["signedBy"] == first.name
    world.reconcile(SPREAD)
    assert world.status["certificates"]["signedBy"] == second.name
    assert len(world.trusted("router")) == 2, "until the first one has ended"
    assert world.certificate("router").issuer == x509.load_pem_x509_certificate(second.certificate).subject


def test_of_two_operators_that_make_an_authority_one_has_made_it() -> None:
    world = World()
    theirs = new_authority(NOW)
    world.store.others.append(theirs)
    world.reconcile()
    assert world.store.found == [theirs]
    assert world.status["certificates"]["signedBy"] == theirs.name


def test_an_annotation_asks_for_new_certificates_once() -> None:
    world = World()
    world.reconcile()
    world.service["metadata"]["annotations"] = {CERTIFICATES: "a key was seen"}
    world.reconcile()
    world.reconcile()
    assert world.issued() == 2


def test_a_secret_that_was_deleted_is_made_again_when_a_pod_waits_for_it() -> None:
    world = World()
    world.reconcile()
    world.cluster.secrets.clear()
    world.reconcile()
    assert world.issued() == 1, "who runs has its files"
    waiting = {
        "name": "p",
        "labels": {"serving.kvasir.dev/inferenceservice": "llama", "serving.kvasir.dev/role": "decode"},
    }
    world.cluster.listed_pods.append({"metadata": waiting, "status": {}})
    world.reconcile()
    assert world.issued() == 2
    world.reconcile()
    assert world.issued() == 2


@pytest.mark.parametrize("paused", [True, False])
def test_what_runs_keeps_its_certificates_while_nothing_of_it_may_be_changed(paused: bool) -> None:
    world = World()
    world.reconcile()
    if paused:
        world.service["metadata"]["annotations"] = {PAUSED: "true"}
    else:
        world.service["spec"]["prefill"] = {"replicas": -1}
    world.reconcile(RENEW_AFTER)
    assert world.issued() == 2
    assert world.status["certificates"]["issuedAt"] == "2026-01-11T00:00:00Z"
    world.begin()
    world.reconcile(timedelta(days=1))
    assert world.issued() == 2


def test_a_spec_that_was_never_good_gets_none() -> None:
    world = World(prefill={"replicas": -1})
    world.reconcile()
    assert world.issued() == 0


def test_without_encryption_there_are_none_and_the_status_says_what_that_means() -> None:
    world = World(transfer={"encryption": "Off"})
    world.reconcile()
    assert world.cluster.secrets == {}
    conditions = world.cluster.conditions()
    assert "CertificatesReady" not in conditions
    assert conditions["TransferEncrypted"]["reason"] == "Off"
    assert "tls" not in str(world.cluster.objects)
    assert "8443" not in str(world.cluster.objects)


@pytest.mark.parametrize(
    ("transfer", "reason", "status"),
    [
        ({"fabric": "tcp"}, "PlainTCP", "False"),
        ({}, "PlainTCP", "False"),
        ({"fabric": "shm"}, "SharedMemory", "True"),
        ({"fabric": "rdma", "rdmaResource": "rdma/hca"}, "TrustedFabric", "False"),
        ({"rdmaResource": "rdma/hca"}, "TrustedFabric", "False"),
    ],
)
def test_what_is_not_encrypted_is_a_condition(transfer: Object, reason: str, status: str) -> None:
    world = World(transfer=transfer)
    world.reconcile()
    found = world.cluster.conditions()["TransferEncrypted"]
    assert (found["reason"], found["status"]) == (reason, status)


def test_a_refused_secret_is_in_the_status_and_tried_again() -> None:
    world = World()
    world.cluster.refuse["Secret"] = ClusterError(403, "secrets is forbidden")
    with pytest.raises(ClusterError, match="forbidden"):
        world.reconcile()
    found = world.cluster.conditions()["CertificatesReady"]
    assert (found["status"], found["reason"]) == ("False", "Refused")
    assert "forbidden" in found["message"]
    assert world.cluster.conditions()["Degraded"]["reason"] == "Refused"
    del world.cluster.refuse["Secret"]
    world.reconcile()
    assert world.cluster.conditions()["CertificatesReady"]["status"] == "True"


def test_an_authority_that_cannot_be_read_stops_nothing_else() -> None:
    world = World()
    world.store.error = ClusterError(403, "secrets is forbidden")
    world.reconcile()
    assert world.cluster.conditions()["CertificatesReady"]["reason"] == "NoAuthority"
    assert any(r.kind == "Deployment" for r in world.cluster.objects)


def test_what_was_issued_is_not_taken_from_a_status_that_makes_no_sense() -> None:
    world = World()
    world.reconcile()
    world.service["status"]["certificates"] = {"issuedAt": 7}
    world.reconcile()
    assert world.issued() == 2
    assert world.cluster.conditions()["CertificatesReady"]["status"] == "True"


def test_a_secrets_name_cannot_be_chosen_by_who_writes_the_service() -> None:
    def names(uid: str) -> set[str]:
        found = document("shop")
        found["metadata"]["uid"] = uid
        cluster = FakeCluster(found)
        operator = Reconciler(
            cluster,
            Options(),
            lambda model: None,
            lambda: NOW,
            certificates=CertificateManager(cluster, Store(), lambda: NOW),
        )
        operator.reconcile("default", "shop")
        return set(cluster.secrets)

    assert not names("one") & names("two")
    assert all(name.startswith("shop-") and len(name.rpartition("-tls-")[2]) == 8 for name in names("one"))


def test_authorities_are_read_or_refused_by_name() -> None:
    one = new_authority(NOW)

    def secret(**data: bytes) -> Object:
        encoded = {key.replace("_", "."): base64.b64encode(value).decode() for key, value in data.items()}
        return {"metadata": {"name": "authority", "namespace": "system"}, "data": encoded}

    assert authorities(secret(a_crt=one.certificate, a_key=one.key)) == [one]
    assert authorities(secret()) == []
    other = new_authority(NOW)
    for data, why in (
        ({"a_crt": one.certificate}, "no counterpart"),
        ({"a_key": one.key}, "no counterpart"),
        ({"a_crt": one.certificate, "a_key": other.key}, "not the certificate's"),
        ({"a_crt": b"x", "a_key": one.key}, "is no authority"),
        ({"a_crt": one.certificate, "a_key": b"x"}, "is no authority"),
        ({"notes": b"x"}, "no counterpart"),
    ):
        with pytest.raises(ClusterError, match=why) as error:
            authorities(secret(**data))
        assert "system/authority" in str(error.value)


def test_nothing_is_rendered_where_nobody_asks_for_it() -> None:
    off, on = (str(render(service(transfer={"encryption": each}), Options())) for each in ("Off", "Auto"))
    assert "/etc/kvasir/tls" in on
    assert "/etc/kvasir/tls" not in off
