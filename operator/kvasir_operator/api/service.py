"""The InferenceService itself, and what all its pods share."""

from typing import Annotated, Literal

import msgspec

from kvasir_operator.api.engine import Engine
from kvasir_operator.api.fields import OBJECT_NAME, QUALIFIED_NAME, Part, about, listed, text, words
from kvasir_operator.api.model import Model
from kvasir_operator.api.rollout import Drain, Rollout
from kvasir_operator.api.router import Router
from kvasir_operator.api.scaling import Scaling
from kvasir_operator.api.scheduling import Scheduling
from kvasir_operator.api.workers import Transfer, Workers

_LABEL_VALUE = r"^[A-Za-z0-9]([-._A-Za-z0-9]*[A-Za-z0-9])?$"

GpuProduct = Annotated[str, text("A value of the label, such as NVIDIA-H100-80GB-HBM3.", _LABEL_VALUE, 63)]
WorkerRole = Literal["prefill", "decode"]
WORKER_ROLES: tuple[WorkerRole, ...] = ("prefill", "decode")


class Placement(Part, frozen=True):
    """Which nodes pods prefer."""

    topology_key: Annotated[
        str,
        text(
            "Node label of a block (rack, fabric block) within which KV travels fast: workers are placed in the "
            "same block where there is room. Default: no preference.",
            QUALIFIED_NAME,
            253,
        ),
    ] = ""
    gpu_products: Annotated[
        list[GpuProduct],
        words(
            "Values of the node label nvidia.com/gpu.product that workers with device cuda must run on. "
            "Default: H100 nodes are preferred, and others are taken too.",
            32,
        ),
    ] = []


class SecretReference(Part, frozen=True):
    """A Secret of the same namespace."""

    name: Annotated[str, text("Name of the Secret.", OBJECT_NAME, 253)]


class Spec(Part, frozen=True):
    """What is wanted."""

    model: Annotated[Model, about("The model to serve.")]
    prefill: Annotated[Workers, about("Workers that compute the prompts' KV cache.")] = Workers()
    decode: Annotated[Workers, about("Workers that generate.")] = Workers()
    router: Annotated[Router, about("The OpenAI endpoint.")] = Router()
    engine: Annotated[
        Engine, about("The engine's image, what all its pods have in common, what workers are told.")
    ] = Engine()
    transfer: Annotated[Transfer, about("How KV travels from prefill to decode.")] = Transfer()
    rollout: Annotated[Rollout, about("How workers of one revision give way to the next.")] = Rollout()
    drain: Annotated[Drain, about("How a worker leaves.")] = Drain()
    scaling: Annotated[Scaling, about("Who says how many workers there are.")] = Scaling()
    scheduling: Annotated[Scheduling, about("How pods are placed, beyond what nodes they prefer.")] = Scheduling()
    placement: Annotated[Placement, about("Which nodes pods prefer.")] = Placement()
    priority_class_name: Annotated[
        str, text("PriorityClass of all pods. Default: the cluster's.", OBJECT_NAME, 253)
    ] = ""
    image_pull_secrets: Annotated[
        list[SecretReference], listed("Secrets with which the engine's image is pulled.", 16)
    ] = []
    operator_class: Annotated[
        str,
        text(
            "Which operator serves this: one that runs with --operator-class of this name. Default: one that runs "
            "without.",
            OBJECT_NAME,
            63,
        ),
    ] = ""
    network_policy: Annotated[
        Literal["Restricted", "None"],
        about(
            "Restricted: NetworkPolicies let workers talk to each other, to DNS and, where they download the "
            "model, to port 443; routers to workers, DNS and the API server; and only routers to workers. None: "
            "no NetworkPolicies are made."
        ),
    ] = "Restricted"

    def workers(self, role: WorkerRole) -> Workers:
        """The pool of that role."""
        return self.prefill if role == "prefill" else self.decode


class InferenceService(msgspec.Struct, frozen=True):
    """A valid InferenceService with all defaults filled in. `uid` is empty when no API server gave one."""

    name: str
    namespace: str
    spec: Spec
    uid: str = ""
    generation: int = 0

    @property
    def served_name(self) -> str:
        """The name by which clients ask for the model."""
        return self.spec.model.name or self.name
