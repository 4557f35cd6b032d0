"""This machine's devices and folders, and which fields of an InferenceService it supports."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kvasir_engine.model.loading.uri import ClaimURI
from kvasir_engine.model.loading.uri import parse as parse_uri
from kvasir_operator.api import WORKER_ROLES, InferenceService
from kvasir_operator.local.errors import LocalError
from kvasir_operator.local.manifest import Manifest


@dataclass(frozen=True)
class Machine:
    """Devices and folders. `gpus`: values for CUDA_VISIBLE_DEVICES. `claims`: folders that replace claims.

    `cores`: those that this process may use.
    """

    gpus: tuple[str, ...] = ()
    rdma: bool = False
    claims: Mapping[str, str] = field(default_factory=dict)
    cores: int = 1


def detect(claims: Mapping[str, str]) -> Machine:
    """Detect this machine's devices. Raises LocalError if the folder of a claim does not exist."""
    for claim, path in claims.items():
        if not Path(path).is_dir():
            raise LocalError(f"--claim {claim}={path}: no such directory")
    infiniband = Path("/sys/class/infiniband")
    rdma = infiniband.is_dir() and any(infiniband.iterdir())
    folders = {name: str(Path(path).absolute()) for name, path in claims.items()}
    return Machine(_gpus(), rdma, folders, len(os.sched_getaffinity(0)))


def _gpus() -> tuple[str, ...]:
    """The GPUs that have device files and are visible by CUDA_VISIBLE_DEVICES."""
    dev = Path("/dev")
    present = sorted(int(m[1]) for p in dev.glob("nvidia*") if (m := re.fullmatch(r"nvidia(\d+)", p.name)))
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if present and chosen is not None:
        return tuple(c.strip() for c in chosen.split(",") if c.strip() not in ("", "-1"))
    return tuple(str(number) for number in range(len(present)))


def check(manifest: Manifest, machine: Machine) -> list[str]:
    """Notes on fields that have no effect here. Raises LocalError for fields that cannot work here."""
    problems = list(_problems(manifest, machine))
    if problems:
        raise LocalError("; ".join(problems))
    notes = list(_notes(manifest.service))
    if count := sharers(manifest.service, machine):
        notes.append(
            f"spec.prefill.device and spec.decode.device: the {count} workers share the one GPU of this machine, "
            f"each with a part of its memory"
        )
    return notes


def sharers(service: InferenceService, machine: Machine) -> int:
    """The number of workers that share this machine's only GPU; 0 if each worker has its own."""
    workers = [service.spec.workers(role) for role in WORKER_ROLES]
    alone = all(each.device == "cuda" and each.replicas == each.tensor_parallel == 1 for each in workers)
    return len(workers) if alone and len(machine.gpus) == 1 else 0


def _problems(manifest: Manifest, machine: Machine) -> Iterator[str]:
    service, spec = manifest.service, manifest.service.spec
    yield from _gpu_problems(service, machine)
    if spec.scaling.mode in ("Auto", "Shadow"):
        yield f"spec.scaling.mode is {spec.scaling.mode}, and nothing scales workers on one machine: use Fixed"
    if spec.transfer.fabric == "rdma" and not machine.rdma:
        yield "spec.transfer.fabric is rdma, and this machine has no RDMA device: use auto, tcp or shm"
    uri = parse_uri(spec.model.uri)
    if isinstance(uri, ClaimURI) and uri.claim not in machine.claims:
        yield f"spec.model.uri: no folder stands for the claim {uri.claim!r} here: --claim {uri.claim}=PATH"
    secret = spec.router.auth.secret_name
    if secret and secret not in manifest.secrets:
        yield f"spec.router.auth.secretName: Secret {secret!r} is not in the manifest: add it as a document"


def _gpu_problems(service: InferenceService, machine: Machine) -> Iterator[str]:
    on_gpu = [
        r for r in WORKER_ROLES if service.spec.workers(r).device == "cuda" and service.spec.workers(r).replicas
    ]
    wanted = sum(service.spec.workers(r).replicas * service.spec.workers(r).tensor_parallel for r in on_gpu)
    if wanted > len(machine.gpus) and not sharers(service, machine):
        fields = " and ".join(f"spec.{role}.device" for role in on_gpu)
        verb = "is" if len(on_gpu) == 1 else "are"
        has = f"{len(machine.gpus)} GPUs for the {wanted} asked for" if machine.gpus else "no CUDA device"
        yield f"{fields} {verb} cuda, and this machine has {has}: set device: cpu"


def _notes(service: InferenceService) -> Iterator[str]:
    spec = service.spec
    expose = spec.router.expose
    if expose.type != "Service":
        what = f"{expose.type} {expose.host}".strip()
        yield f"spec.router.expose: no {what} is made here; the router answers at the address below"
    if spec.transfer.rdma_resource and spec.transfer.fabric == "auto":
        yield f"spec.transfer.rdmaResource: {spec.transfer.rdma_resource} is not asked for; UCX takes what it finds"
    for role in WORKER_ROLES:
        workers = spec.workers(role)
        if workers.nodes > 1:
            yield f"spec.{role}.nodes: the {workers.nodes} pods of a worker share this machine"
        if workers.resources.requests or workers.resources.limits:
            yield f"spec.{role}.resources: processes are not held to requests and limits"
        pod = workers.template.get("spec") or {}
        if placed := [f for f in ("nodeSelector", "affinity", "tolerations", "nodeName") if pod.get(f)]:
            yield f"spec.{role}.template.spec: {', '.join(placed)} mean nothing on one machine"
