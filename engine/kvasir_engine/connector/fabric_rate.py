"""What a fabric should give, and what to look at where it gives a tenth of that. Pure, but for `nic_rate`.

NIXL does not say which transport UCX took, and UCX takes a slower one in silence. The rate tells.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kvasir_engine.config import Fabric

DEGRADED = 0.1
"""Of what the fabric should give: less is another road, not a busy one."""
GIGABIT = 1e9 / 8
USUAL_NIC = 100 * GIGABIT
"""Of an RDMA device that does not say."""
CUDA_IPC = 50e9
"""Bytes a second between two GPUs of one machine; one card alone copies at 260 GB/s (docs/performance.md)."""
DEVICES = Path("/sys/class/infiniband")

_RDMA_LOOK = (
    "UCX went another way than RDMA, or KV goes by way of the host: look at UCX_TLS and UCX_NET_DEVICES, whether "
    "the pod has the RDMA device (ibv_devinfo) and may lock memory, and for GPUs whether nvidia-peermem or dmabuf "
    "is there"
)
_IPC_LOOK = (
    "KV goes by way of the host: look at UCX_TLS (cuda_ipc is to be in it), whether both pods see both GPUs and "
    "share the host's IPC namespace, and at `nvidia-smi topo -p2p r`"
)


@dataclass(frozen=True)
class FabricRate:
    """What carries KV, as it is asked for: its name, and bytes a second of it; 0 where nobody can say."""

    name: str = "auto"
    expected: float = 0.0
    look: str = ""

    def problem(self, rate: float) -> str:
        """What to look at where a link has this rate; empty where it is as it should be."""
        if rate >= DEGRADED * self.expected:
            return ""
        return f"{rate / 1e9:.2g} GB/s by {self.name}, which should give {self.expected / 1e9:.3g}: {self.look}"


ANY_FABRIC = FabricRate()


def fabric_rate(fabric: Fabric, cuda: bool, environment: Mapping[str, str], nic: float | None = None) -> FabricRate:
    """What a worker may expect that was told `fabric` and has its KV on a GPU, if `cuda`.

    `nic`: bytes a second of the fastest RDMA device, None where there is none. `environment` as the agent sees it:
    who named transports by UCX_TLS, and no fabric, has their names shown. Nobody can say what TCP and host memory
    should give.
    """
    transports = environment.get("UCX_TLS", "")
    if fabric == "rdma":
        return FabricRate("rdma", nic or USUAL_NIC, _RDMA_LOOK)
    if fabric == "shm" and cuda:
        return FabricRate("shm", CUDA_IPC, _IPC_LOOK)
    if fabric == "auto" and nic is not None and not transports:
        return FabricRate("auto", nic, _RDMA_LOOK)
    return FabricRate(transports if fabric == "auto" and transports else fabric)


def nic_rate(devices: Path = DEVICES) -> float | None:
    """Bytes a second of this machine's fastest RDMA device, as the kernel says it; 0 where it does not."""
    found = None
    for port in sorted(devices.glob("*/ports/*/rate")):
        try:
            said = re.match(r"\s*(\d+(?:\.\d+)?) Gb/sec", port.read_text())
        except OSError:
            said = None
        found = max(found or 0.0, float(said[1]) * GIGABIT if said else 0.0)
    return found
