"""NetworkPolicies: who may talk to whom, by role and direction.

    clients -> router -> workers <-> workers       router -> API server       all -> DNS
                                                   workers -> model hub, where they download the model

Routers reach the port that asks them for a certificate; the operator, and what collects metrics, the one of probes
and metrics. Between workers every port is open: NIXL's transport listens on ports that the kernel chooses (and RDMA
passes no NetworkPolicy at all). A router is open to everybody on its one port, which asks for API keys where the
spec names some; clients come from Ingress controllers and namespaces that nobody here knows.
"""

from typing import Literal

from kvasir_operator.api import InferenceService
from kvasir_operator.render.names import Object, Role, labels, metadata, selector, workers_of
from kvasir_operator.render.options import Options
from kvasir_operator.render.pod import PORT, WORKER_PORT
from kvasir_operator.render.storage import downloads, preloads

# The API server's Service has port 443; where a network plugin looks at the address behind it, it is mostly 6443.
API_SERVER_PORTS = (443, 6443)
HUB_PORTS = (443,)
DNS_PORT = 53
NAMESPACE_LABEL = "kubernetes.io/metadata.name"  # which API servers set from 1.21 on
OPERATOR_LABELS = {"app.kubernetes.io/name": "kvasir-operator"}

Peer = Object
_Role = Role | Literal["preload"]


def policies(service: InferenceService, options: Options) -> list[Object]:
    """The NetworkPolicies of a service; none where its spec wants none."""
    if service.spec.network_policy == "None":
        return []
    workers, routers = _pods(workers_of(service)), _pods({"matchLabels": selector(service, "router")})
    watchers = _watchers(options)
    hub = [_to_anywhere(HUB_PORTS)] if downloads(service) else []
    # What a Job has loaded, workers need not download.
    worker_hub = [] if preloads(service) else hub
    from_workers: Object = {"from": [workers]}
    router_port = PORT if service.spec.transfer.encryption == "Off" else WORKER_PORT
    in_worker = [from_workers, {"from": [routers], "ports": _tcp(router_port)}]
    if watchers:
        in_worker.append({"from": watchers, "ports": _tcp(PORT)})
    found = [
        _policy(
            service,
            "router",
            [{"ports": _tcp(PORT)}],
            [{"to": [workers]}, _dns(), _to_anywhere(API_SERVER_PORTS)],
        ),
        *(
            _policy(service, role, in_worker, [{"to": [workers]}, _dns(), *worker_hub])
            for role in ("prefill", "decode")
        ),
    ]
    if preloads(service):
        operators = _operators(options)
        progress = [{"from": operators, "ports": _tcp(PORT)}] if operators else []
        found.append(_policy(service, "preload", progress, [_dns(), *hub]))
    return found


def _policy(service: InferenceService, role: _Role, ingress: list[Object], egress: list[Object]) -> Object:
    spec = {"podSelector": {"matchLabels": selector(service, role)}, "policyTypes": ["Ingress", "Egress"]}
    # Without rules a direction is closed. An empty list would be dropped by the API server, and be missed.
    rules = {"ingress": ingress, "egress": egress}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata(service, f"{service.name}-{role}", labels(service, role)),
        "spec": {**spec, **{direction: found for direction, found in rules.items() if found}},
    }


def _operators(options: Options) -> list[Peer]:
    if not options.operator_namespace:
        return []
    return [{**_namespace(options.operator_namespace), **_pods({"matchLabels": OPERATOR_LABELS})}]


def _watchers(options: Options) -> list[Peer]:
    """The operator, and whatever collects metrics."""
    metrics = [_namespace(options.metrics_namespace)] if options.metrics_namespace else []
    return [*_operators(options), *metrics]


def _pods(labels: Object) -> Peer:
    return {"podSelector": labels}


def _namespace(name: str) -> Peer:
    return {"namespaceSelector": {"matchLabels": {NAMESPACE_LABEL: name}}}


def _tcp(*ports: int) -> list[Object]:
    return [{"protocol": "TCP", "port": port} for port in ports]


def _to_anywhere(ports: tuple[int, ...]) -> Object:
    return {"ports": _tcp(*ports)}


def _dns() -> Object:
    return {"ports": [{"protocol": protocol, "port": DNS_PORT} for protocol in ("UDP", "TCP")]}
