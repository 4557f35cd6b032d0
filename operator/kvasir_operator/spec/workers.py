"""The pools of workers, and how KV travels between them."""

from typing import Annotated, Any, Literal

from kvasir_operator.spec.fields import Part, Quantity, about, count, text

_RESOURCE_NAME = r"^[a-z0-9]([-.a-z0-9]*[a-z0-9])?/[A-Za-z0-9]([-._A-Za-z0-9]*[A-Za-z0-9])?$"

Device = Literal["cuda", "cpu"]
Fabric = Literal["auto", "rdma", "tcp", "shm"]


class Resources(Part, frozen=True):
    """Requests and limits of the worker's container, over what Kvasir asks for itself."""

    requests: dict[str, Quantity] = {}
    limits: dict[str, Quantity] = {}


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
    template: Annotated[
        dict[str, Any],
        about(
            "Pod template (metadata labels and annotations, spec) merged over the rendered one. Objects merge; "
            "containers, env, ports and mounts merge by name; tolerations join; other lists and volumes are "
            "replaced. The worker's "
            "container is called kvasir; its flags can be set as environment variables KVASIR_FLAG. A nodeSelector "
            "or nodeAffinity, also an empty one, takes the place of the preference for H100 nodes."
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
        text("Extended resource that gives a pod an RDMA device, for example rdma/hca.", _RESOURCE_NAME, 253),
    ] = ""
