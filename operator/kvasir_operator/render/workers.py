"""The worker Deployments: one a role and a revision. Workers over several nodes are in `groups.py`."""

from collections.abc import Mapping, Sequence

from kvasir_engine.connector.fabric import fabric_env
from kvasir_operator.api import InferenceService, WorkerRole, Workers
from kvasir_operator.api.devices import GPU, pod_claims, selects_gpu_nodes, whole_gpus
from kvasir_operator.api.kv_fingerprint import fingerprint
from kvasir_operator.api.worker_settings import flags_of
from kvasir_operator.render.defaults import worker_resources
from kvasir_operator.render.fabric import rdma_requests, share_node
from kvasir_operator.render.merge import merged, with_spec_resources
from kvasir_operator.render.monitoring import SCRAPE_ANNOTATIONS
from kvasir_operator.render.names import (
    KV_LABEL,
    REVISION_LABEL,
    Object,
    labels,
    metadata,
    ownerless,
    revision_of,
    selector,
    worker_name,
)
from kvasir_operator.render.options import Options
from kvasir_operator.render.placement import pair
from kvasir_operator.render.pod import container, drain_args, model_args, serving_pod, tls_args
from kvasir_operator.render.storage import startup_seconds

# Values of nvidia.com/gpu.product on H100 nodes: GPU feature discovery takes the name that NVML gives and writes
# dashes for spaces (NVIDIA/k8s-device-plugin, internal/lm). In order: SXM5, PCIe, NVL.
H100_PRODUCTS = ["NVIDIA-H100-80GB-HBM3", "NVIDIA-H100-PCIe", "NVIDIA-H100-NVL"]
PRODUCT_LABEL = "nvidia.com/gpu.product"

CPU_REQUESTS: dict[str, int | str] = {"cpu": "1", "memory": "2Gi"}
GPU_CPUS_PER_RANK = 4
GPU_MEMORY_PER_RANK_GI = 16
# NCCL and UCX keep their per-peer buffers in /dev/shm, of which a container gets 64 MiB otherwise.
SHM_PER_RANK_MI = 1024


def worker_deployment(service: InferenceService, role: WorkerRole, options: Options) -> Object:
    """The Deployment of `role`, named after the revision of its pod template."""
    template = worker_template(service, role, options)
    revision = revision_of(worker_template(ownerless(service), role, options))
    own_labels = {REVISION_LABEL: revision, KV_LABEL: fingerprint(service.spec, role)}
    template["metadata"]["labels"].update(own_labels)
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata(
            service, worker_name(service, role, revision), {**labels(service, role), **own_labels}
        ),
        "spec": {
            "replicas": service.spec.workers(role).replicas,
            "progressDeadlineSeconds": startup_seconds(service),
            "revisionHistoryLimit": 0,
            "selector": {"matchLabels": {**selector(service, role), REVISION_LABEL: revision}},
            "template": template,
        },
    }


def worker_template(service: InferenceService, role: WorkerRole, options: Options) -> Object:
    """The pod template of `role` without its revision, the spec's overlay applied."""
    return merged(rendered_template(service, role, options), service.spec.workers(role))


def rendered_template(
    service: InferenceService, role: WorkerRole, options: Options, more_args: Sequence[str] = ()
) -> Object:
    """The pod template of `role` before the spec's overlay. `more_args`: further flags of the worker."""
    workers, transfer = service.spec.workers(role), service.spec.transfer
    args = [
        "worker",
        "--role",
        role,
        *model_args(service),
        "--dtype",
        service.spec.model.dtype,
        "--device",
        workers.device,
        "--tensor-parallel",
        str(workers.tensor_parallel),
        "--fabric",
        transfer.fabric,
        *tls_args(service, role),
        *drain_args(service),
        *more_args,
        *flags_of(service.spec, role),
    ]
    main = container(
        options,
        args,
        fabric_env(transfer.fabric, workers.device == "cuda"),
        _resources(service, workers, options),
    )
    spec = serving_pod(service, role, main, options)
    if transfer.fabric == "shm":
        share_node(service, spec)
    else:
        main["volumeMounts"].append({"name": "shm", "mountPath": "/dev/shm"})
        size = f"{SHM_PER_RANK_MI * workers.ranks_per_pod}Mi"
        spec["volumes"].append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": size}})
    if rdma_requests(service, workers):
        # Registering memory with an RDMA device pins it.
        main["securityContext"]["capabilities"]["add"] = ["IPC_LOCK"]
    if workers.device == "cuda":
        _place_on_gpus(service, workers, spec)
    if found := pod_claims(workers):
        spec["resourceClaims"] = found
    pair(service, spec)
    metadata = {"labels": labels(service, role), "annotations": dict(SCRAPE_ANNOTATIONS)}
    return {"metadata": metadata, "spec": spec}


def _resources(service: InferenceService, workers: Workers, options: Options) -> Object:
    ranks = workers.ranks_per_pod
    limits: dict[str, int | str] = dict(rdma_requests(service, workers))
    if workers.device == "cuda":
        requests: dict[str, int | str] = {
            "cpu": str(GPU_CPUS_PER_RANK * ranks),
            "memory": f"{GPU_MEMORY_PER_RANK_GI * ranks}Gi",
        }
        if whole_gpus(workers):
            limits[GPU] = str(ranks)
    else:
        requests = dict(CPU_REQUESTS)
    # The API server copies limits of extended resources to the requests; saying so here keeps what is applied
    # and what is stored the same.
    requests |= limits
    return with_spec_resources(worker_resources(service, workers, options, requests, limits), workers)


def _place_on_gpus(service: InferenceService, workers: Workers, spec: Object) -> None:
    """Nodes with the GPUs that the spec names, or any, those with H100s first."""
    spec["tolerations"] = [{"key": GPU, "operator": "Exists", "effect": "NoSchedule"}]
    patch = workers.template.get("spec", {})
    affinity = patch.get("affinity")
    chosen = "nodeSelector" in patch or (isinstance(affinity, Mapping) and "nodeAffinity" in affinity)
    if chosen or not selects_gpu_nodes(workers):
        return  # the spec chooses the nodes itself, which may be any
    named = service.spec.placement.gpu_products
    products = {"key": PRODUCT_LABEL, "operator": "In", "values": list(named or H100_PRODUCTS)}
    term = {"matchExpressions": [products]}
    preferred: Object = (
        {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}
        if named
        else {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "preference": term}]}
    )
    spec.setdefault("affinity", {})["nodeAffinity"] = preferred
