"""What a test tells the node agent: its nodes, and what this machine gives to their pods."""

from pathlib import Path

import msgspec

#: A node with this label runs pods that ask for `cuda` on this device: the one lie of the end-to-end tests.
EMULATED_DEVICE = "kvasir.dev/emulated-device"


class Taint(msgspec.Struct, frozen=True):
    """A node's taint."""

    key: str
    effect: str
    value: str = ""


class Node(msgspec.Struct, frozen=True):
    """A node to register. `capacity` (quantities by resource) is all allocatable."""

    name: str
    labels: dict[str, str] = {}
    taints: tuple[Taint, ...] = ()
    capacity: dict[str, str] = {}


class Config(msgspec.Struct, frozen=True):
    """The agent's configuration file.

    `netns` is the cluster's namespace (pods' names are made from it), `state` the folder for volumes and logs.
    `volumes` replaces the pods' volumes of these names by folders of this machine (for example the model cache, so
    that a model is converted once and not once a pod). `first` is the number of the first node, from which
    addresses and names are made: agents of one cluster have different ones. `proxy`: Services are this agent's too.
    """

    kubeconfig: Path
    ca: Path
    netns: str
    state: Path
    nodes: tuple[Node, ...]
    volumes: dict[str, Path] = {}
    first: int = 1
    proxy: bool = True


def h100_node(name: str, gpus: int = 8) -> Node:
    """A node as an H100 machine shows itself: GPU feature discovery's label, the plugins' resources, a taint."""
    return Node(
        name=name,
        labels={
            "nvidia.com/gpu.present": "true",
            "nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3",
            EMULATED_DEVICE: "cpu",
        },
        taints=(Taint("nvidia.com/gpu", "NoSchedule", "present"),),
        capacity={
            "cpu": "104",
            "memory": "1024Gi",
            "ephemeral-storage": "1024Gi",
            "pods": "110",
            "nvidia.com/gpu": str(gpus),
            "rdma/hca": str(gpus),
        },
    )


def cpu_node(name: str, *taints: Taint) -> Node:
    """A node without accelerators."""
    return Node(
        name=name,
        taints=taints,
        capacity={"cpu": "64", "memory": "256Gi", "ephemeral-storage": "1024Gi", "pods": "110"},
    )
