"""What the transfer's fabric changes in a worker's pod.

UCX chooses transports by UCX_TLS (openucx.readthedocs.io, FAQ "Which transports does UCX use?"): `rc`, `ud` and
`dc` stand for the verbs and mlx5 variants of these, `sm` for posix, sysv and cma; as soon as a list is given,
GPU memory needs `cuda_copy` and `cuda_ipc` in it too. Naming a fabric leaves out the others, so that KV never
takes a slower road in silence; `auto` leaves the choice to UCX, which ranks what it finds by bandwidth and
latency. UCX_NET_DEVICES stays unset (all): a pod sees only the devices that were given to it. An environment
entry in the role's template replaces any of these.
"""

from kvasir_operator.render.names import SERVICE_LABEL, Object
from kvasir_operator.spec import Device, Fabric, InferenceService, Workers

_TRANSPORTS: dict[Fabric, tuple[str, ...]] = {
    "auto": (),
    "rdma": ("rc", "ud", "dc", "self"),
    "tcp": ("tcp", "self"),
    "shm": ("sm", "self"),
}
_GPU_TRANSPORTS = ("cuda_copy", "cuda_ipc")


def fabric_env(fabric: Fabric, device: Device) -> dict[str, str]:
    """Environment that holds UCX to `fabric`; empty for `auto`."""
    transports = _TRANSPORTS[fabric]
    if not transports:
        return {}
    env = {"UCX_TLS": ",".join(transports + (_GPU_TRANSPORTS if device == "cuda" else ()))}
    if fabric == "shm":
        # By default segments are opened through /proc/PID/fd, which needs a common process namespace.
        env["UCX_POSIX_USE_PROC_LINK"] = "n"
    return env


def rdma_requests(service: InferenceService, workers: Workers) -> dict[str, str]:
    """The RDMA devices that a worker asks for: one a rank where the spec names the resource."""
    resource = service.spec.transfer.rdma_resource
    return {resource: str(workers.tensor_parallel)} if resource else {}


def share_node(service: InferenceService, spec: Object) -> None:
    """Put all workers of `service` on one node and into its IPC namespace, whose /dev/shm they share."""
    spec["hostIPC"] = True
    spec["affinity"] = {
        "podAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": [
                {
                    "labelSelector": {
                        "matchLabels": {SERVICE_LABEL: service.name},
                        "matchExpressions": [
                            {"key": "serving.kvasir.dev/role", "operator": "In", "values": ["prefill", "decode"]}
                        ],
                    },
                    "topologyKey": "kubernetes.io/hostname",
                }
            ]
        }
    }
