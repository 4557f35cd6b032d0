"""The shipped rules are the calls that the operator makes: no verb more, none less."""

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from isvc_cases import document

from kvasir_operator.admission import parse
from kvasir_operator.api import GROUP, PLURAL
from kvasir_operator.api.kinds import SET_API_VERSION, SET_KIND
from kvasir_operator.certificates import Authority, new_authority
from kvasir_operator.cluster.authority_store import AuthorityStore
from kvasir_operator.cluster.client import ISSUED, KINDS, Cluster
from kvasir_operator.cluster.election import Leadership
from kvasir_operator.cluster.interface import ClusterError
from kvasir_operator.cluster.lease_candidate import LeaseCandidate
from kvasir_operator.cluster.lease_client import ClusterLease
from kvasir_operator.controller import WATCHED, WATCHED_IF_SERVED
from kvasir_operator.plan.observed import Reference
from kvasir_operator.reconcile.certificates import CertificateManager
from kvasir_operator.reconcile.ownership import OtherOperators
from kvasir_operator.reconcile.pod_owners import PodOwners
from kvasir_operator.reconcile.reconciler import Reconciler
from kvasir_operator.render import Issuer, Options, render
from kvasir_operator.render.names import CERTIFICATES, REVISION_LABEL, ROLE_LABEL, SERVICE_LABEL, Object

RULES = Path(__file__).parents[2] / "charts/kvasir/templates/_rules.tpl"
PATH = re.compile(
    r"/(?:api|apis/(?P<group>[^/]+))/[^/]+/namespaces/[^/]+/(?P<plural>\w+)(?:/(?P<name>[^/]+))?(?P<sub>/\w+)?"
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
Verb = tuple[str, str, str]
PLURALS = {**KINDS, **ISSUED}
OWN = Options()
LEASE = ("coordination.k8s.io", "leases")


class KeptAuthorities:
    """The operator's own Secret, in memory: its rules are others."""

    def __init__(self) -> None:
        self.found: list[Authority] = []
        self.version = 0

    def read(self) -> tuple[list[Authority], str]:
        return list(self.found), str(self.version)

    def write(self, found: list[Authority], version: str) -> bool:
        assert version == str(self.version)
        self.found, self.version = list(found), self.version + 1
        return True


class FakeServer:
    """An API server in memory behind the transport's interface, which notes the verbs it would ask RBAC for."""

    def __init__(self, *services: Object) -> None:
        self.objects: dict[str, Object] = {}
        for item in services:
            self.objects[f"/apis/{GROUP}/v1alpha1/namespaces/default/{PLURAL}/{item['metadata']['name']}"] = item
        self.verbs: set[Verb] = set()
        self.answer: dict[tuple[str, str], tuple[int, bytes]] = {}
        self.authorities = KeptAuthorities()

    def __call__(
        self, method: str, path: str, query: Mapping[str, str], body: Any, content_type: str
    ) -> tuple[int, bytes]:
        if (method, path) in self.answer:
            return self.answer[method, path]
        found = PATH.fullmatch(path)
        if found is None:
            return self._discovery(path)
        group, plural, name = found["group"] or "", found["plural"] + (found["sub"] or ""), found["name"]

        def ask(verb: str) -> None:
            self.verbs.add((group, plural, verb))

        match method:
            case "GET" if name:
                ask("get")
                item = self.objects.get(path)
                return (200, json.dumps(item).encode()) if item else (404, b"404 page not found")
            case "GET":
                ask("list")
                items = [o for p, o in self.objects.items() if p.startswith(path + "/")]
                return 200, json.dumps({"kind": "List", "items": items}).encode()
            case "PATCH" if content_type == "application/merge-patch+json":
                assert query == {"fieldManager": "kvasir"}
                ask("patch")
                live = self.objects[path]
                assert body["metadata"]["resourceVersion"] == live["metadata"].get("resourceVersion", "")
                self.objects[path] = {**live, "spec": {**live["spec"], **body["spec"]}}
                return 200, b"{}"
            case "PATCH":
                assert content_type == "application/apply-patch+yaml"
                assert query == {"fieldManager": "kvasir", "force": "true"}
                ask("patch")
                return self._apply(path.removesuffix("/status"), body, ask)
            case "DELETE":
                ask("delete")
                gone = self.objects.pop(path, None)
                return (200, b"{}") if gone else (404, b"{}")
            case "POST" if plural == "secrets":
                ask("create")
                target = f"{path}/{body['metadata']['name']}"
                if target in self.objects:
                    return 409, b'{"message": "already exists"}'
                if "dryRun" not in query:
                    self.objects[target] = body
                return 201, b"{}"
            case "PUT" if plural == "secrets":
                ask("update")
                assert path in self.objects
                self.objects[path] = body
                return 200, b"{}"
            case "POST":
                ask("create")
                return 201, b"{}"
        raise AssertionError(method)

    def _apply(self, path: str, body: Any, ask: Any) -> tuple[int, bytes]:
        if path not in self.objects:
            ask("create")
        self.objects[path] = (
            {**self.objects.get(path, {}), **body}
            if "status" not in body
            else {
                **self.objects[path],
                "status": body["status"],
            }
        )
        self.objects[path]["metadata"].setdefault("uid", path)
        return 200, json.dumps(self.objects[path]).encode()

    def _discovery(self, path: str) -> tuple[int, bytes]:
        version = path.removeprefix("/apis/").removeprefix("/api/")
        kinds = [{"kind": kind} for api_version, kind in PLURALS if api_version == version]
        return (200, json.dumps({"resources": kinds}).encode()) if kinds else (404, b"404 page not found")


def allowed(certificates: str = "secretRules") -> set[Verb]:
    """In the namespaces of services, with who signs certificates."""
    return shipped("rules") | shipped(certificates)


def shipped(template: str) -> set[Verb]:
    (found,) = re.findall(rf'define "kvasir.{template}" -\}}\}}(.*?)\{{\{{- end', RULES.read_text(), flags=re.S)
    text = re.sub(r"\{\{-?.*?-?\}\}", "x", found, flags=re.S)
    return {
        (group, resource, verb)
        for rule in yaml.safe_load(text)
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def reconcile(server: FakeServer, options: Options = OWN) -> None:
    cluster = Cluster(server, by_cert_manager=options.issuer is not None)
    manager = CertificateManager(cluster, server.authorities, lambda: NOW)
    owners = PodOwners(cluster)
    operator = Reconciler(cluster, options, lambda model: None, lambda: NOW, certificates=manager, owners=owners)
    operator.reconcile("default", "llama")


def pod(kind: str) -> Object:
    """A router's pod that something of this kind made."""
    owner = {"apiVersion": "apps/v1", "kind": kind, "name": "llama-router-x", "uid": kind, "controller": True}
    labels = {SERVICE_LABEL: "llama", ROLE_LABEL: "router"}
    return {
        "metadata": {"name": f"made-by-{kind}", "labels": labels, "ownerReferences": [owner]},
        "status": {"podIP": "10.0.0.1"},
    }


def used(options: Options) -> set[Verb]:
    """What the operator asks of an API server in the life of services of every kind of exposure."""
    found = document(
        router={"expose": {"type": "Ingress"}},
        model={"uri": "hf://a/b", "cache": {"claimName": "c"}},
        scaling={"mode": "External"},
    )
    server = FakeServer(found)
    for kind in ("ReplicaSet", "StatefulSet"):
        server.objects[f"/api/v1/namespaces/default/pods/{kind}"] = pod(kind)
    reconcile(server, options)
    reconcile(server, options)  # InferenceRoles that are there are told their sizes
    stored = server.objects[f"/apis/{GROUP}/v1alpha1/namespaces/default/{PLURAL}/llama"]
    stored["metadata"]["annotations"] = {CERTIFICATES: "2"}
    found["spec"]["scaling"] = {}
    for expose in (
        {"type": "HTTPRoute", "className": "g"},
        {"type": "InferencePool", "endpointPicker": {"name": "epp"}},
        {"type": "Service"},
    ):
        stored = server.objects[f"/apis/{GROUP}/v1alpha1/namespaces/default/{PLURAL}/llama"]
        stored["spec"]["router"] = {"expose": expose}
        reconcile(server, options)
    stored["spec"]["prefill"] = {"replicas": -1}
    reconcile(server, options)
    # Kinds that a service always has become surplus when an operator of another version named them otherwise.
    for item in render(parse(document(model=found["spec"]["model"])), options):
        plural = PLURALS[item["apiVersion"], item["kind"]]
        root = "/api/v1" if item["apiVersion"] == "v1" else f"/apis/{item['apiVersion']}"
        name = f"{item['metadata']['name']}-older"
        older = {**item, "metadata": {**item["metadata"], "name": name, "uid": name}}
        if REVISION_LABEL in item["metadata"]["labels"]:
            older["metadata"]["labels"] = {**item["metadata"]["labels"], REVISION_LABEL: "older"}
        server.objects[f"{root}/namespaces/default/{plural}/{name}"] = older
    stored["spec"]["prefill"] = {}
    for _ in range(5):
        for path, item in server.objects.items():
            if "/deployments/" in path:
                wanted = item["spec"]["replicas"]
                counts = dict.fromkeys(("replicas", "readyReplicas", "updatedReplicas"), wanted)
                item["status"] = {**counts, "observedGeneration": 1}
            elif "/jobs/" in path:
                item["status"] = {"conditions": [{"type": "Complete", "status": "True"}]}
        reconcile(server, options)
    assert not [path for path in server.objects if path.endswith("-older")]
    stored["spec"]["prefill"] = {"tensorParallel": 2, "nodes": 2, "replicas": 1}
    reconcile(server, options)
    stored["spec"]["prefill"]["replicas"] = 0
    reconcile(server, options)
    OtherOperators(lambda namespace, name: ClusterLease(server, namespace, name).read())("other/kvasir")
    watched = {(group, plural) for group, _, plural in (*WATCHED, WATCHED_IF_SERVED)} | {(GROUP, PLURAL)}
    return server.verbs | {(group, plural, verb) for group, plural in watched for verb in ("list", "watch")}


def test_the_shipped_rules_are_the_calls_that_are_made() -> None:
    assert allowed() == used(Options())


def test_where_cert_manager_issues_certificates_no_secret_is_touched() -> None:
    assert allowed("issuerRules") == used(Options(issuer=Issuer("internal")))
    assert not [rule for rule in allowed("issuerRules") if rule[1].startswith("secrets")]


def test_the_leases_rules_are_the_calls_that_are_made() -> None:
    store: dict[str, Any] = {}
    verbs = set()

    def send(method: str, path: str, query: Any, body: Any, content_type: str) -> tuple[int, bytes]:
        assert path.removesuffix("/kvasir").endswith("/namespaces/system/leases")
        verbs.add({"GET": "get", "POST": "create", "PUT": "update"}[method])
        if method == "GET":
            return (200, json.dumps(store).encode()) if store else (404, b"{}")
        store.update(body, metadata={"resourceVersion": "1"})
        return 200, b"{}"

    leadership = Leadership(LeaseCandidate("a"), ClusterLease(send, "system", "kvasir"))
    leadership.attempt()
    leadership.attempt()
    leadership.resign()
    found = {(*LEASE, verb) for verb in verbs}
    assert found == {rule for rule in shipped("leaseRules") if rule[:2] == LEASE}


def test_the_authoritys_rules_are_the_calls_that_are_made_and_only_one_secret_is_read() -> None:
    store: dict[str, Any] = {}
    verbs = set()

    def send(method: str, path: str, query: Any, body: Any, content_type: str) -> tuple[int, bytes]:
        assert path.removesuffix("/kvasir-authority").endswith("/namespaces/system/secrets")
        assert (method == "POST") == (not path.endswith("/kvasir-authority"))
        verbs.add({"GET": "get", "POST": "create", "PUT": "update"}[method])
        if method == "GET":
            return (200, json.dumps(store).encode()) if store else (404, b"{}")
        store.update(body, metadata={**body["metadata"], "resourceVersion": "1"})
        return 200, b"{}"

    authorities = AuthorityStore(send, "system", "kvasir-authority")
    first = new_authority(NOW)
    assert authorities.read() == ([], "")
    assert authorities.write([first], "")
    assert authorities.read() == ([first], "1")
    assert authorities.write([first, new_authority(NOW)], "1")
    assert shipped("authorityRules") == {("", "secrets", verb) for verb in verbs}
    text = RULES.read_text()
    (own,) = re.findall(r'define "kvasir.authorityRules" -\}\}(.*?)\{\{- end', text, flags=re.S)
    named = [rule for rule in re.split(r"^- ", own, flags=re.M) if "secrets" in rule and "get" in rule]
    assert len(named) == 1
    assert 'resourceNames: [{{ include "kvasir.fullname" . }}-authority]' in named[0]


def test_no_secret_of_a_service_can_be_read_by_the_operators_token() -> None:
    """A patch would answer with the whole object, a list and a watch with all of them; a deletion that waits for
    dependants answers with the object too."""
    assert {verb for _, resource, verb in allowed() if resource.startswith("secrets")} == {"create", "update"}
    assert not {rule for rule in allowed() if "*" in rule}


def test_the_operator_holds_what_it_grants_to_routers() -> None:
    """Nobody may grant what they have not got, so the API server would refuse the router's Role."""
    roles = [o for o in render(parse(document()), Options()) if o["kind"] == "Role"]
    granted = {
        (group, resource, verb)
        for role in roles
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert granted
    assert granted <= allowed()


@pytest.mark.parametrize("name", ["theirs", "llama-router"])
def test_objects_of_another_owner_are_neither_changed_nor_deleted(name: str) -> None:
    server = FakeServer(document())
    (ours,) = [o for o in render(parse(document()), Options()) if o["kind"] == "Service"]
    theirs = {**ours, "metadata": {**ours["metadata"], "name": name, "ownerReferences": [{"uid": "another"}]}}
    path = f"/api/v1/namespaces/default/services/{name}"
    server.objects[path] = theirs
    if name == "llama-router":
        with pytest.raises(ClusterError, match="does not belong"):
            reconcile(server)
    else:
        reconcile(server)
    assert server.objects[path] is theirs


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((403, json.dumps({"kind": "Status", "message": "forbidden: no"}).encode()), "forbidden: no"),
        ((502, b"<html>bad gateway"), "HTTP 502: <html>bad gateway"),
    ],
)
def test_what_the_server_says_against_a_request_is_passed_on(answer: tuple[int, bytes], message: str) -> None:
    server = FakeServer(document())
    server.answer["GET", "/api/v1/namespaces/default/pods"] = answer
    with pytest.raises(ClusterError, match=message) as error:
        reconcile(server)
    assert error.value.status == answer[0]


def test_an_event_that_is_there_already_is_no_error() -> None:
    server = FakeServer(document())
    server.answer["POST", "/api/v1/namespaces/default/events"] = (409, b'{"message": "exists"}')
    reconcile(server)


def test_an_event_that_may_not_be_posted_is_logged_unless_its_namespace_ends(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = FakeServer(document())
    refused = b'{"message": "events \\"e\\" is forbidden: %s"}'
    ending = b"unable to create new content in namespace default because it is being terminated"
    server.answer["POST", "/api/v1/namespaces/default/events"] = (403, refused % ending)
    reconcile(server)
    assert "event refused" not in caplog.text
    server = FakeServer(document())
    server.answer["POST", "/api/v1/namespaces/default/events"] = (403, refused % b"User cannot create resource")
    reconcile(server)
    assert "event refused" in caplog.text
    assert "cannot create" in caplog.text


def test_a_group_that_is_installed_later_is_noticed() -> None:
    server = FakeServer()
    cluster = Cluster(server)
    server.answer["GET", "/apis/gateway.networking.k8s.io/v1"] = (404, b"404 page not found")
    assert not cluster.serves("gateway.networking.k8s.io/v1", "HTTPRoute")
    server.answer.clear()
    assert cluster.serves("gateway.networking.k8s.io/v1", "HTTPRoute")


def test_a_group_that_is_removed_is_no_error_and_is_asked_for_again() -> None:
    server = FakeServer(document())
    cluster = Cluster(server)
    assert cluster.serves(SET_API_VERSION, SET_KIND)
    away = (404, b"404 page not found")
    server.answer["GET", f"/apis/{SET_API_VERSION}/namespaces/default/leaderworkersets"] = away
    server.answer["GET", f"/apis/{SET_API_VERSION}"] = away
    assert cluster.owned("default", "llama", "uid") == []
    assert not cluster.serves(SET_API_VERSION, SET_KIND)


@pytest.mark.parametrize(("status", "message"), [(409, "is not the object's"), (404, "not found")])
def test_what_another_has_taken_the_name_of_is_not_deleted(status: int, message: str) -> None:
    server = FakeServer()
    target = Reference(SET_API_VERSION, SET_KIND, "llama-prefill-1-0")
    path = f"/apis/{SET_API_VERSION}/namespaces/default/leaderworkersets/{target.name}"
    server.answer["DELETE", path] = (status, json.dumps({"message": message}).encode())
    Cluster(server).delete("default", target, "uid-1")
    if status == 409:
        with pytest.raises(ClusterError, match=message):
            Cluster(server).delete("default", target)
