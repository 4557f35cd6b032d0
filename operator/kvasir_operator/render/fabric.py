"""What the fabric changes in a worker's pod, besides the environment that `connector/fabric.py` gives."""

from kvasir_operator.api import InferenceService, Workers
from kvasir_operator.render.names import Object, workers_of


def rdma_requests(service: InferenceService, workers: Workers) -> dict[str, str]:
    """The RDMA devices that a worker's pod asks for: one a rank of the pod where the spec names the resource."""
    resource = service.spec.transfer.rdma_resource
    return {resource: str(workers.ranks_per_pod)} if resource else {}


def share_node(service: InferenceService, spec: Object) -> None:
    """Put all workers of `service` on one node and into its IPC namespace, whose /dev/shm they share."""
    spec["hostIPC"] = True
    spec["affinity"] = {
        "podAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": [
                {"labelSelector": workers_of(service), "topologyKey": "kubernetes.io/hostname"}
            ]
        }
    }
