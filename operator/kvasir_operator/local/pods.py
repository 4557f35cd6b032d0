"""The pods of a local run, from an InferenceService and addresses."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kvasir_operator.api import SET_KIND, WORKER_ROLES, InferenceService
from kvasir_operator.api.devices import GPU
from kvasir_operator.api.kinds import CONTAINER
from kvasir_operator.local.addresses import PodAddress, free_port
from kvasir_operator.local.machine import Machine, sharers
from kvasir_operator.pods import groups
from kvasir_operator.render import Options, StaticWorkers, render
from kvasir_operator.render.names import ROLE_LABEL
from kvasir_operator.render.pod import PORT, WORKER_PORT

ENGINE_IMAGE = Options().engine_image

GPU_SHARERS = "KVASIR_GPU_SHARERS"
"""The engine's variable: how many workers divide a GPU's memory."""

_WORKER_PORT = "KVASIR_WORKER_PORT"

Object = dict[str, Any]


@dataclass(frozen=True)
class LocalPod:
    """One pod of a run, with the address at which it listens.

    `group`: the name of its leader, if its worker has several pods; else empty.
    """

    name: str
    role: str
    address: PodAddress
    pod: Object
    group: str = ""


@dataclass(frozen=True)
class _Pod:
    """A rendered pod without an address yet."""

    role: str
    group: str
    pod: Object

    @property
    def name(self) -> str:
        return str(self.pod["metadata"]["name"])

    @property
    def serves(self) -> bool:
        """Whether routers send it requests: in a group only to the leader."""
        return self.role != "router" and self.group in ("", self.name)


def count(service: InferenceService) -> int:
    """The number of pods of `service`."""
    return len(_rendered(service, ()))


def pods(service: InferenceService, addresses: Sequence[PodAddress], machine: Machine) -> list[LocalPod]:
    """The rendered pods, workers first, with what a scheduler and a kubelet add: name, address and GPUs.

    A worker over several pods has the pods that LeaderWorkerSet's controller would create.
    """
    secure = service.spec.transfer.encryption != "Off"
    spoken = {each: WORKER_PORT if each.port == PORT else free_port() for each in addresses}
    places = zip(_rendered(service, ()), addresses, strict=False)
    urls = tuple(
        f"https://{address.ip}:{spoken[address]}" if secure else f"http://{address}"
        for pod, address in places
        if pod.serves
    )
    rendered = _rendered(service, urls)
    at = {each.name: address for each, address in zip(rendered, addresses, strict=False)}
    gpus, sharing = list(machine.gpus), sharers(service, machine)
    ranks = {name: free_port() for name in sorted({each.group for each in rendered} - {""})}
    for each in rendered:
        for container in each.pod["spec"]["containers"]:
            if container["name"] == CONTAINER:
                _listen(container, at[each.name], spoken[at[each.name]])
                _take_gpus(container, gpus, sharing)
        if each.group:
            _meet(each.pod, at[each.group], ranks[each.group])
    workers = [each for each in rendered if each.role != "router"]
    for each in workers:
        _share_cores(each.pod, max(1, machine.cores // len(workers)))
    return [LocalPod(each.name, each.role, at[each.name], each.pod, each.group) for each in rendered]


def _rendered(service: InferenceService, urls: tuple[str, ...]) -> list[_Pod]:
    """The pods of the rendered objects, workers first."""
    objects = render(service, Options(engine_image=ENGINE_IMAGE, discovery=StaticWorkers(urls)))
    return [
        pod
        for role in (*WORKER_ROLES, "router")
        for item in objects
        if item["metadata"]["labels"].get(ROLE_LABEL) == role
        for pod in _pods_of(item, role)
    ]


def _pods_of(item: Object, role: str) -> Iterator[_Pod]:
    if item["kind"] == "Deployment":
        for index in range(item["spec"]["replicas"]):
            template = copy.deepcopy(item["spec"]["template"])
            own = {"name": f"{item['metadata']['name']}-{index}", "namespace": item["metadata"]["namespace"]}
            template["metadata"] = {**template.get("metadata", {}), **own}
            yield _Pod(role, "", {"apiVersion": "v1", "kind": "Pod", **template})
    elif item["kind"] == SET_KIND:
        for number in range(groups.replicas(item)):
            for pod in groups.pods(item, number):
                yield _Pod(role, groups.leader_name(item, number), pod)


def _take_gpus(container: Object, gpus: list[str], sharing: int) -> None:
    """Assign a pod as many of `gpus` as it requests; where `sharing` workers share one, that one and a part of its
    memory."""
    count = int((container.get("resources", {}).get("limits") or {}).get(GPU, 0))
    if count and sharing:
        _set(container, "CUDA_VISIBLE_DEVICES", gpus[0])
        _set(container, GPU_SHARERS, str(sharing))
    elif count:
        _set(container, "CUDA_VISIBLE_DEVICES", ",".join(gpus[:count]))
        del gpus[:count]


def _meet(pod: Object, leader: PodAddress, port: int) -> None:
    """Let the pods of a group connect to their leader's address, at a port of this group alone.

    No name server resolves the leader's name here, and pods of one machine share its ports. A container that ends
    is not restarted alone: `group.py` restarts its whole group.
    """
    pod["spec"]["restartPolicy"] = "Never"
    for container in pod["spec"]["containers"]:
        _set(container, groups.LEADER_ADDRESS, leader.ip)
        reference = f"$({groups.LEADER_ADDRESS}):"
        container["args"] = [
            f"{reference}{port}" if arg.startswith(reference) else arg for arg in container.get("args", [])
        ]


def _listen(container: Object, address: PodAddress, spoken: int) -> None:
    """Set the address at which a pod listens, as the pods of one machine share its network.

    `spoken`: the port at which a worker accepts routers.
    """
    _set(container, "KVASIR_HOST", address.ip)
    for rendered, number, variable in ((PORT, address.port, "KVASIR_PORT"), (WORKER_PORT, spoken, _WORKER_PORT)):
        for port in container["ports"]:
            if port["containerPort"] == rendered != number:
                _set(container, variable, str(number))
                port["containerPort"] = number


def _share_cores(pod: Object, threads: int) -> None:
    """Divide the machine's cores among its CPU workers, whose threads would otherwise compete for them."""
    for container in pod["spec"]["containers"]:
        if container["name"] == CONTAINER and all(e["name"] != "OMP_NUM_THREADS" for e in container.get("env", [])):
            _set(container, "OMP_NUM_THREADS", str(threads))


def _set(container: Object, name: str, value: str) -> None:
    """Set a variable of a container; an existing one keeps its place."""
    entry = {"name": name, "value": value}
    env = container.setdefault("env", [])
    at = next((index for index, each in enumerate(env) if each["name"] == name), len(env))
    env[at : at + 1] = [entry]
