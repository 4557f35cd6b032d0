"""What tells UCX which transports may carry the KV. Imports nothing heavy: the operator writes it into pods.

UCX chooses transports by UCX_TLS (openucx.readthedocs.io, FAQ "Which transports does UCX use?"): `rc`, `ud` and
`dc` stand for the verbs and mlx5 variants of these, `sm` for posix, sysv and cma; as soon as a list is given,
GPU memory needs `cuda_copy` and `cuda_ipc` in it too. Naming a fabric leaves out the others, so that KV never
takes a slower road in silence; but shared memory cannot tell that a peer has died (UCX: "no peer failure handler"),
so messages, and the news of a death, take TCP beside it. `auto` leaves the choice to UCX, which ranks what it finds
by bandwidth and latency. UCX_NET_DEVICES stays unset (all), but where
encryption is required: a pod sees only the devices that were given to it.
"""

from kvasir_engine.config import Fabric

_TRANSPORTS: dict[Fabric, tuple[str, ...]] = {
    "auto": (),
    "rdma": ("rc", "ud", "dc", "self"),
    "tcp": ("tcp", "self"),
    "shm": ("sm", "tcp", "self"),
}
_GPU_TRANSPORTS = ("cuda_copy", "cuda_ipc")


def fabric_env(fabric: Fabric, cuda: bool, within_machine: bool = False) -> dict[str, str]:
    """Environment that holds UCX to `fabric`, for KV in GPU memory if `cuda`; empty for `auto`.

    `within_machine`: to shared memory, with TCP on loopback, which is out of others' reach.
    """
    if within_machine:
        return {**fabric_env("shm", cuda), "UCX_NET_DEVICES": "lo"}
    transports = _TRANSPORTS[fabric]
    if not transports:
        return {}
    env = {"UCX_TLS": ",".join(transports + (_GPU_TRANSPORTS if cuda else ()))}
    if fabric == "shm":
        # By default segments are opened through /proc/PID/fd, which needs a common process namespace.
        env["UCX_POSIX_USE_PROC_LINK"] = "n"
    return env
