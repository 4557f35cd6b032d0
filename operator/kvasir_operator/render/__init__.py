"""PURE: an InferenceService in, the objects that serve it out, as plain dictionaries.

Names, labels, ports, flags and volumes are those of docs/architecture.md. Nothing here knows a client, a clock or
an environment, so the same service and options always give the same objects.
"""

from kvasir_operator.api import WORKER_ROLES, InferenceService, WorkerRole
from kvasir_operator.render.groups import worker_sets
from kvasir_operator.render.guards import accounts, budgets
from kvasir_operator.render.issued import issued_certificates
from kvasir_operator.render.monitoring import pod_monitor
from kvasir_operator.render.names import Object
from kvasir_operator.render.network import network
from kvasir_operator.render.options import Discovery, Issuer, Options, PodWatch, StaticWorkers
from kvasir_operator.render.policies import policies
from kvasir_operator.render.preload import preload_job
from kvasir_operator.render.release_defaults import with_release_defaults
from kvasir_operator.render.router import router_deployment
from kvasir_operator.render.scale import inference_roles
from kvasir_operator.render.workers import worker_deployment

__all__ = [
    "Discovery",
    "Issuer",
    "Object",
    "Options",
    "PodWatch",
    "StaticWorkers",
    "render",
    "with_release_defaults",
]


def render(service: InferenceService, options: Options) -> list[Object]:
    """Everything that `service` needs, in the order in which it is best created."""
    service = with_release_defaults(service, options)
    return [
        *(_around(service, options) if options.in_cluster else ()),
        router_deployment(service, options),
        *network(service),
        *(item for role in WORKER_ROLES for item in _workers(service, role, options)),
    ]


def _workers(service: InferenceService, role: WorkerRole, options: Options) -> list[Object]:
    if service.spec.workers(role).nodes > 1:
        return worker_sets(service, role, options)
    return [worker_deployment(service, role, options)]


def _around(service: InferenceService, options: Options) -> list[Object]:
    """What only a cluster has: accounts, NetworkPolicies, disruption budgets, monitoring."""
    monitors = [pod_monitor(service)] if options.pod_monitors else []
    return [
        *(issued_certificates(service, options.issuer) if options.issuer else ()),
        *accounts(service),
        *policies(service, options),
        *budgets(service),
        *monitors,
        *inference_roles(service),
        *preload_job(service, options),
    ]
