"""The pools of workers, and how KV travels between them."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Protocol

from kvasir_engine.config import Fabric
from kvasir_operator.api.engine_settings import EngineSettings
from kvasir_operator.api.fields import (
    OBJECT_NAME,
    RESOURCE_NAME,
    Part,
    Quantity,
    about,
    count,
    entries,
    listed,
    text,
    words,
)

_LABEL = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"

Device = Literal["cuda", "cpu"]
Encryption = Literal["Auto", "Required", "Off"]


class Claim(Part, frozen=True):
    """A claim of the pod that the container uses."""

    name: Annotated[str, text("Name of an entry of resourceClaims.", _LABEL, 63)]
    request: Annotated[str, text("Which of the claim's requests. Default: all.", _LABEL, 63)] = ""


class PodClaim(Part, frozen=True):
    """A claim for devices (dynamic resource allocation)."""

    name: Annotated[str, text("Name of the claim within the pod.", _LABEL, 63)]
    resource_claim_name: Annotated[str, text("ResourceClaim that all the role's pods share.", OBJECT_NAME, 253)] = (
        ""
    )
    resource_claim_template_name: Annotated[
        str, text("ResourceClaimTemplate, of which each pod has a ResourceClaim of its own.", OBJECT_NAME, 253)
    ] = ""


class Resources(Part, frozen=True):
    """Requests and limits of the worker's container, over what Kvasir asks for itself."""

    requests: Annotated[
        dict[str, Quantity],
        entries("Requests. Those that are Kvasir's own are no more than the limits.", 32),
    ] = {}
    limits: Annotated[
        dict[str, Quantity],
        entries(
            "Limits. A MIG device (nvidia.com/mig-1g.10gb) takes the place of nvidia.com/gpu.",
            32,
        ),
    ] = {}
    claims: Annotated[
        list[Claim],
        listed("Claims of the pod that the container uses. Default: all of resourceClaims.", 32),
    ] = []


class PodOverlay(Protocol):
    """What the spec says of a pod over what Kvasir renders: of a role's workers, of routers, of the Job."""

    @property
    def resources(self) -> Resources:
        """Requests and limits of the container `kvasir`."""

    @property
    def resource_claims(self) -> list[PodClaim]:
        """Claims of the pod."""

    @property
    def template(self) -> Mapping[str, Any]:
        """A pod template, which may be anything."""


class Workers(Part, frozen=True):
    """One pool of workers."""

    replicas: Annotated[int, count("Number of workers.", 0, 10_000)] = 1
    tensor_parallel: Annotated[
        int, count("GPUs a worker splits the model over. It must divide the model's KV heads.", 1, 64)
    ] = 1
    nodes: Annotated[
        int,
        count(
            "Pods that a worker is divided among, each with tensorParallel/nodes of its GPUs. Above 1 a worker is "
            "a group of a LeaderWorkerSet, which has to be installed.",
            1,
            64,
        ),
    ] = 1
    device: Annotated[Device, about("cuda: NVIDIA GPUs. cpu: no GPU, on any node.")] = "cuda"
    resources: Annotated[
        Resources,
        about("Requests and limits of the worker's container, merged over Kvasir's own."),
    ] = Resources()
    resource_claims: Annotated[
        list[PodClaim],
        listed(
            "Claims for devices (Kubernetes 1.32 on), which take the place of nvidia.com/gpu; where a claim is "
            "for something else, set limits[nvidia.com/gpu] too.",
            32,
        ),
    ] = []
    engine: Annotated[
        EngineSettings, about("What this role's workers are told; each field over that of spec.engine.")
    ] = EngineSettings()
    extra_args: Annotated[
        list[Annotated[str, text("A flag or its value.", length=1024)]],
        words("The same as engine.extraArgs, of which one may be set.", 64),
    ] = []
    template: Annotated[
        dict[str, Any],
        about(
            "Pod template (metadata labels and annotations, spec) merged over the rendered one. Objects merge; "
            "containers, env, ports and mounts merge by name; tolerations join; other lists and volumes are "
            "replaced. The worker's container is called kvasir; what it is told stands in engine. "
            "A probe's or hook's handler takes the place of Kvasir's. A nodeSelector or nodeAffinity, "
            "also an empty one, takes the place of the preference for H100 nodes."
        ),
    ] = {}

    @property
    def ranks_per_pod(self) -> int:
        """The ranks, and so the GPUs, of each of a worker's pods."""
        return self.tensor_parallel // self.nodes


class Transfer(Part, frozen=True):
    """How KV travels from prefill to decode."""

    fabric: Annotated[
        Fabric,
        about(
            "rdma, tcp, or shm (all workers on one node, in the node's IPC namespace). "
            "auto: RDMA where rdmaResource is named, else what UCX finds best."
        ),
    ] = "auto"
    rdma_resource: Annotated[
        str,
        text("Extended resource that gives a pod an RDMA device, for example rdma/hca.", RESOURCE_NAME, 253),
    ] = ""
    encryption: (
        Annotated[
            Encryption,
            about(
                "Auto: routers and workers speak mutual TLS by certificates that the operator makes and renews; "
                "KV itself is not encrypted on its way. Required: KV too may not leave a machine, as no fabric but "
                "shm keeps it from who is on the network. Off: no certificates; who reaches a worker's ports can "
                "read and write its KV. Absent: Auto, but Off as long as a service keeps a release from before "
                "certificates."
            ),
        ]
        | None
    ) = None
