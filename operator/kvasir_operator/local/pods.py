"""PURE: an InferenceService and addresses in, the pods of a local run out."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvasir_operator.local.addresses import Address
from kvasir_operator.local.machine import Machine
from kvasir_operator.render import Options, Static, render
from kvasir_operator.render.names import ROLE_LABEL
from kvasir_operator.render.pod import CONTAINER, PORT
from kvasir_operator.spec import WORKER_ROLES, InferenceService
from kvasir_operator.validate import GPU

ENGINE_IMAGE = Options().engine_image

Object = dict[str, Any]


@dataclass(frozen=True)
class LocalPod:
    """One pod of a run, with the address at which it listens."""

    name: str
    role: str
    address: Address
    pod: Object


def count(service: InferenceService) -> int:
    """How many pods `service` has."""
    return sum(service.spec.workers(role).replicas for role in WORKER_ROLES) + service.spec.router.replicas


def pods(service: InferenceService, addresses: Sequence[Address], machine: Machine) -> list[LocalPod]:
    """The rendered pods, workers first, with what a scheduler and a kubelet add: name, address and GPUs."""
    workers = sum(service.spec.workers(role).replicas for role in WORKER_ROLES)
    urls = tuple(f"http://{address}" for address in addresses[:workers])
    objects = render(service, Options(engine_image=ENGINE_IMAGE, discovery=Static(urls)))
    deployments = {o["metadata"]["labels"][ROLE_LABEL]: o for o in objects if o["kind"] == "Deployment"}
    found: list[LocalPod] = []
    gpus = list(machine.gpus)
    for role in (*WORKER_ROLES, "router"):
        deployment = deployments[role]
        for index in range(deployment["spec"]["replicas"]):
            address = addresses[len(found)]
            name = f"{deployment['metadata']['name']}-{index}"
            found.append(LocalPod(name, role, address, _pod(deployment, name, address, gpus)))
    for each in found[:workers]:
        _share_cores(each.pod, max(1, machine.cores // workers))
    return found


def _pod(deployment: Object, name: str, address: Address, gpus: list[str]) -> Object:
    template = copy.deepcopy(deployment["spec"]["template"])
    metadata = {**template.get("metadata", {}), "name": name, "namespace": deployment["metadata"]["namespace"]}
    for container in template["spec"]["containers"]:
        if container["name"] == CONTAINER:
            _listen(container, address)
            asked = int((container.get("resources", {}).get("limits") or {}).get(GPU, 0))
            if asked:
                _set(container, "CUDA_VISIBLE_DEVICES", ",".join(gpus[:asked]))
                del gpus[:asked]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def _listen(container: Object, address: Address) -> None:
    """Pods of one machine share its network, so each is told its address instead of listening on all."""
    _set(container, "KVASIR_HOST", address.ip)
    if address.port != PORT:
        _set(container, "KVASIR_PORT", str(address.port))
        for port in container["ports"]:
            if port["containerPort"] == PORT:
                port["containerPort"] = address.port


def _share_cores(pod: Object, threads: int) -> None:
    """CPU workers of one machine divide its cores: each with a thread for every core, they would thrash."""
    for container in pod["spec"]["containers"]:
        if container["name"] == CONTAINER and all(e["name"] != "OMP_NUM_THREADS" for e in container.get("env", [])):
            _set(container, "OMP_NUM_THREADS", str(threads))


def _set(container: Object, name: str, value: str) -> None:
    others = [entry for entry in container.get("env", []) if entry["name"] != name]
    container["env"] = [*others, {"name": name, "value": value}]
