"""PURE: an InferenceService in, the objects that serve it out, as plain dictionaries.

Names, labels, ports, flags and volumes are those of docs/architecture.md. Nothing here knows a client, a clock or
an environment, so the same service and options always give the same objects.
"""

from kvasir_operator.render.names import Object
from kvasir_operator.render.network import network
from kvasir_operator.render.options import Discovery, Options, PodWatch, Static
from kvasir_operator.render.router import router
from kvasir_operator.render.workers import worker_deployment
from kvasir_operator.spec import WORKER_ROLES, InferenceService

__all__ = ["Discovery", "Object", "Options", "PodWatch", "Static", "render"]


def render(service: InferenceService, options: Options) -> list[Object]:
    """Everything that `service` needs, in the order in which it is best created."""
    return [
        *router(service, options),
        *network(service),
        *(worker_deployment(service, role, options) for role in WORKER_ROLES),
    ]
