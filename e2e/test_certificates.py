"""Certificates on the real control plane: who has none gets nothing, and new ones lose no stream."""

import base64
import json
import socket
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from e2e import kvasir, stage, steps, tiny
from e2e.controlplane.cluster import Cluster
from e2e.stage import NAME, Stage
from e2e.steps import Object, condition, eventually, pods
from kvasir_operator.certificates import identity, new_authority
from kvasir_operator.render.names import CERTIFICATES, ROLE_LABEL, SERVICE_LABEL

NAMESPACE = "trusted"
HTTP, WORKER = 8000, 8443
WORKERS = f"{ROLE_LABEL} in (prefill,decode)"
SERVING = f"{ROLE_LABEL} in (prefill,decode,router)"
RENEWED = "credential renewed"
OPERATOR = f"system:serviceaccount:{kvasir.NAMESPACE}:{kvasir.RELEASE}"
AUTHORITY = f"{kvasir.RELEASE}-authority"


@pytest.fixture(scope="module")
def shown(cluster: Cluster) -> Iterator[Stage]:
    """The tiny model under traffic, with two decode workers."""
    with stage.set_up(cluster, stage.service(1, 2, digests=True), NAMESPACE) as found:
        yield found


def service(cluster: Cluster) -> Object:
    found: Object = cluster.get("kvi", NAME, "-n", NAMESPACE)
    return found


def issued(cluster: Cluster) -> Object:
    found: Object = service(cluster)["status"]["certificates"]
    return found


def mounted(cluster: Cluster, role: str) -> dict[str, bytes]:
    """The Secret that pods of a role mount."""
    (name,) = {
        volume["secret"]["secretName"]
        for pod in pods(cluster, NAMESPACE, f"{ROLE_LABEL}={role}")
        for volume in pod["spec"]["volumes"]
        if volume["name"] == "tls"
    }
    data = cluster.get("secret", name, "-n", NAMESPACE)["data"]
    return {key: base64.b64decode(value) for key, value in data.items()}


def ask_for_new_ones(cluster: Cluster, why: str) -> None:
    cluster.kubectl("-n", NAMESPACE, "annotate", "kvi", NAME, f"{CERTIFICATES}={why}", "--overwrite")


def presented(cluster: Cluster, tmp_path: Path) -> dict[str, bytes]:
    """The certificate that each worker shows to who comes with the router's, as PEM."""
    for name, data in mounted(cluster, "router").items():
        (tmp_path / name).write_bytes(data)
    context = ssl.create_default_context(cafile=str(tmp_path / "ca.crt"))
    context.check_hostname = False
    context.load_cert_chain(tmp_path / "tls.crt", tmp_path / "tls.key")
    found = {}
    for pod in pods(cluster, NAMESPACE, WORKERS):
        port = cluster.port(pod["status"]["podIP"], WORKER)
        with (
            socket.create_connection(("127.0.0.1", port), timeout=60) as plain,
            context.wrap_socket(plain) as sock,
        ):
            shown = sock.getpeercert(binary_form=True)
            assert shown is not None
            found[pod["metadata"]["name"]] = ssl.DER_cert_to_PEM_cert(shown).encode()
    return found


def all_show_what_is_mounted(cluster: Cluster, tmp_path: Path) -> bool | None:
    """Whether every worker has taken the certificate that its Secret has now; `None` where not."""
    wanted = {role: mounted(cluster, role)["tls.crt"] for role in ("prefill", "decode")}
    try:
        found = presented(cluster, tmp_path)
    except ssl.SSLError:  # an authority that is not believed yet
        return None
    return all(found[name].strip() == wanted[name.split("-")[1]].strip() for name in found) or None


def names(cluster: Cluster) -> set[str]:
    return {pod["metadata"]["name"] for pod in pods(cluster, NAMESPACE, SERVING)}


def test_each_role_has_a_certificate_with_its_own_name(cluster: Cluster, shown: Stage) -> None:
    assert condition(service(cluster), "CertificatesReady")["status"] == "True"
    for role in ("prefill", "decode", "router"):
        found = mounted(cluster, role)
        leaf = x509.load_pem_x509_certificate(found["tls.crt"])
        uris = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert uris.get_values_for_type(x509.UniformResourceIdentifier) == [identity(NAMESPACE, NAME, role)]
        leaf.verify_directly_issued_by(x509.load_pem_x509_certificate(found["ca.crt"]))


def test_who_shows_no_certificate_is_told_nothing(cluster: Cluster, shown: Stage) -> None:
    for pod in pods(cluster, NAMESPACE, WORKERS):
        address = pod["status"]["podIP"]
        assert _answer(cluster, address, HTTP, _upgrade()).split(b"\r\n")[0].split()[1] in (b"403", b"404")
        assert _answer(cluster, address, WORKER, _upgrade()) == b"", "plain text at the port for TLS"
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        assert _answer(cluster, address, WORKER, _upgrade(), context) == b"", "without a certificate of its own"


def test_a_pod_with_a_workers_labels_is_not_taken_and_gets_no_prompts(cluster: Cluster, shown: Stage) -> None:
    """It is a real worker of the same model, and listens at both ports that its labels promise."""
    (real, *_) = pods(cluster, NAMESPACE, f"{ROLE_LABEL}=decode")
    labels = {key: value for key, value in real["metadata"]["labels"].items() if key != "pod-template-hash"}
    assert labels[SERVICE_LABEL] == NAME
    steps.apply(cluster, _stranger("foreign", labels), namespace=NAMESPACE)

    def up() -> Object | None:
        (pod,) = (p for p in pods(cluster, NAMESPACE) if p["metadata"]["name"] == "foreign")
        return pod if steps.ready(pod) else None

    foreign = eventually(up, 120, "the stranger serves", cluster)
    before = shown.traffic.counts().get("foreign", 0)
    shown.traffic.mark("foreign")
    eventually(
        lambda: shown.traffic.counts().get("foreign", 0) >= before + 12 or None, 60, "requests meanwhile", cluster
    )
    (router,) = pods(cluster, NAMESPACE, f"{ROLE_LABEL}=router")
    told = steps.http(cluster, router["status"]["podIP"], HTTP, "/status") + steps.log_of(cluster, router)
    assert "foreign" not in told
    assert foreign["status"]["podIP"] not in told
    said = json.loads(steps.http(cluster, foreign["status"]["podIP"], HTTP, "/status"))
    assert (said["requests"], said["leases"]) == (0, 0)
    assert "prompt" not in steps.log_of(cluster, foreign)
    assert not shown.traffic.failures()
    cluster.kubectl("-n", NAMESPACE, "delete", "pod", "foreign", "--grace-period=1", "--timeout=120s")


def test_new_certificates_come_under_running_streams_and_none_is_lost(
    cluster: Cluster, shown: Stage, tmp_path: Path
) -> None:
    there = names(cluster)
    old = mounted(cluster, "decode")["tls.crt"]
    shown.traffic.mark("renewing")
    with shown.long.flowing(4):
        ask_for_new_ones(cluster, "1")
        eventually(lambda: mounted(cluster, "decode")["tls.crt"] != old or None, 120, "new certificates", cluster)
        eventually(lambda: all_show_what_is_mounted(cluster, tmp_path), 120, "workers show them", cluster)
    assert names(cluster) == there, "no pod was rolled"
    assert not shown.long.failures()
    assert not shown.traffic.failures()
    told = [event["reason"] for event in cluster.get("events", "-n", NAMESPACE)["items"]]
    assert "CertificatesRenewed" in told
    # A worker that starts now has only the new one, and is spoken to by a router that had the old one.
    (gone, *_) = pods(cluster, NAMESPACE, f"{ROLE_LABEL}=decode")
    shown.traffic.mark("another worker")
    cluster.kubectl("-n", NAMESPACE, "delete", "pod", gone["metadata"]["name"], "--wait=false")
    eventually(
        lambda: (names(cluster) - there and condition(service(cluster), "DecodeReady")["status"] == "True") or None,
        90,
        "another worker serves",
        cluster,
    )
    steps.wait_ready(cluster, NAMESPACE, NAME, 60)
    (router,) = pods(cluster, NAMESPACE, f"{ROLE_LABEL}=router")
    assert RENEWED in steps.log_of(cluster, router)
    assert not shown.traffic.failures()


def test_a_new_authority_takes_over_with_both_believed_and_no_stream_is_lost(
    cluster: Cluster, shown: Stage, tmp_path: Path
) -> None:
    first = issued(cluster)["signedBy"]
    added = new_authority(datetime.now(UTC))
    data = {"next.crt": added.certificate, "next.key": added.key}
    encoded = {key: base64.b64encode(value).decode() for key, value in data.items()}
    cluster.kubectl("-n", kvasir.NAMESPACE, "patch", "secret", AUTHORITY, "-p", json.dumps({"data": encoded}))
    shown.traffic.mark("both")
    number = iter(range(10**6))

    def both() -> bool | None:
        # Nothing tells an operator of it: it looks again when a service is looked at, once a minute at most.
        cluster.kubectl("-n", NAMESPACE, "annotate", "kvi", NAME, f"example.org/look={next(number)}", "--overwrite")
        return len(issued(cluster)["trusted"]) == 2 or None

    eventually(both, 120, "both authorities are believed", cluster)
    assert issued(cluster)["signedBy"] == first, "the new one does not sign before all pods believe it"
    for role in ("prefill", "decode", "router"):
        assert len(x509.load_pem_x509_certificates(mounted(cluster, role)["ca.crt"])) == 2
    eventually(lambda: all_show_what_is_mounted(cluster, tmp_path), 120, "workers show them", cluster)
    # The hour is not waited for: the status says that it is over.
    long_ago = (datetime.now(UTC) - timedelta(hours=2)).strftime("%Y-%m-%dT%H:%M:%SZ")
    trusted = [{**each, "since": long_ago} for each in issued(cluster)["trusted"]]
    patch = json.dumps({"status": {"certificates": {"trusted": trusted}}})
    with shown.long.flowing(4):
        cluster.kubectl("-n", NAMESPACE, "patch", "kvi", NAME, "--subresource=status", "--type=merge", "-p", patch)
        eventually(lambda: issued(cluster)["signedBy"] == added.name or None, 120, "it signs", cluster)
        eventually(lambda: all_show_what_is_mounted(cluster, tmp_path), 120, "workers show its own", cluster)
    (one, *_) = presented(cluster, tmp_path).values()
    x509.load_pem_x509_certificate(one).verify_directly_issued_by(x509.load_pem_x509_certificate(added.certificate))
    assert not shown.long.failures()
    assert not shown.traffic.failures()


@pytest.mark.parametrize("verb", ["get", "list", "watch", "patch", "delete"])
def test_the_operators_token_reads_no_secret_of_a_service(cluster: Cluster, shown: Stage, verb: str) -> None:
    assert _can(cluster, verb, "secrets", NAMESPACE) == "no"
    assert _can(cluster, verb, "secrets", kvasir.NAMESPACE) == "no"
    assert _can(cluster, "get", f"secrets/{AUTHORITY}", kvasir.NAMESPACE) == "yes"


def test_an_update_of_a_secret_shows_nothing_of_what_it_was(cluster: Cluster, shown: Stage) -> None:
    """What the operator's verbs give to who has its token: they destroy a Secret of another, and do not show it."""
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "theirs"}, "data": {"a": "c2VjcmV0"}}
    steps.apply(cluster, secret, namespace=NAMESPACE)
    mine = {**secret, "metadata": {"name": "theirs", "namespace": NAMESPACE}, "data": {"b": "bWluZQ=="}}
    path = f"/api/v1/namespaces/{NAMESPACE}/secrets/theirs"
    words = ("replace", "--raw", path, "-f", "-", "--as", OPERATOR)
    answer = json.loads(cluster.kubectl(*words, input=json.dumps(mine)).stdout)
    assert "c2VjcmV0" not in json.dumps(answer)
    assert answer["data"] == {"b": "bWluZQ=="}


def _can(cluster: Cluster, verb: str, resource: str, namespace: str) -> str:
    words = ("auth", "can-i", verb, resource, "-n", namespace, "--as", OPERATOR)
    return cluster.kubectl(*words, check=False).stdout.strip()


def _upgrade() -> bytes:
    head = ["GET /v1/worker HTTP/1.1", "Host: worker", "Connection: Upgrade", "Upgrade: websocket"]
    head += ["Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="]
    return "\r\n".join([*head, "", ""]).encode()


def _answer(cluster: Cluster, host: str, port: int, sent: bytes, context: ssl.SSLContext | None = None) -> bytes:
    """What comes back first; nothing where the connection is closed instead."""
    with socket.create_connection(("127.0.0.1", cluster.port(host, port)), timeout=60) as plain:
        try:
            sock = context.wrap_socket(plain) if context else plain
            sock.sendall(sent)
            return sock.recv(4096)
        except (ConnectionError, ssl.SSLError):
            return b""


def _stranger(name: str, labels: dict[str, str]) -> dict[str, Any]:
    """A worker that the service did not make."""
    args = ["worker", "--role", "decode", "--model", tiny.URI, "--served-model-name", NAME, "--dtype", "float32"]
    main = {
        "name": "kvasir",
        "image": "kvasir-engine:0",
        "command": ["kvasir"],
        "args": [*args, "--device", "cpu"],
        "env": [
            {"name": "KVASIR_CACHE", "value": "/var/cache/kvasir"},
            {"name": "KVASIR_KV_CACHE_MEMORY", "value": "64Mi"},
        ],
        "ports": [{"name": "http", "containerPort": HTTP}, {"name": "worker", "containerPort": WORKER}],
        "readinessProbe": {"httpGet": {"path": "/ready", "port": "http"}, "periodSeconds": 1},
        "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}},
        "volumeMounts": [
            {"name": "cache", "mountPath": "/var/cache/kvasir"},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "containers": [main],
            "volumes": [{"name": "cache", "emptyDir": {}}, {"name": "tmp", "emptyDir": {}}],
            "automountServiceAccountToken": False,
        },
    }
