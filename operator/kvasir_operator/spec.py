"""The InferenceService as types: parse, default, validate. The CRD is generated from these (`crd.py`).

What a field means stands in its description, which `kubectl explain` shows. A default stands on the field alone.
Checks that a schema cannot express are in `validate.py`.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from kvasir_operator.schema import LIMIT, QUANTITY, Invalid, Schema, problems, structural
from kvasir_operator.validate import semantic_problems

GROUP = "serving.kvasir.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "InferenceService"
PLURAL = "inferenceservices"
ROLE_KIND = "InferenceRole"
ROLE_PLURAL = "inferenceroles"

# The longest derived name is `NAME-prefill-REVISION`; derived names stay DNS labels (RFC 1035), as Services must.
NAME_LENGTH = 63 - len("-prefill-") - 8
NAME_PATTERN = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"
_HOST = r"^(\*\.)?[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"
_OBJECT_NAME = r"^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$"
_CLASS_NAME = r"^[a-z0-9]([-.a-z0-9]*[a-z0-9])?(/[a-z0-9]([-.a-z0-9]*[a-z0-9])?)?$"
_LABEL_KEY = r"^([a-z0-9]([-.a-z0-9]*[a-z0-9])?/)?[A-Za-z0-9]([-._A-Za-z0-9]*[A-Za-z0-9])?$"
_RESOURCE_NAME = r"^[a-z0-9]([-.a-z0-9]*[a-z0-9])?/[A-Za-z0-9]([-._A-Za-z0-9]*[A-Za-z0-9])?$"

Device = Literal["cuda", "cpu"]
Fabric = Literal["auto", "rdma", "tcp", "shm"]
Quantity = Annotated[int | str, Meta(extra_json_schema={"pattern": QUANTITY})]


def _text(description: str, pattern: str | None = None, length: int | None = None) -> Meta:
    return Meta(pattern=pattern, max_length=length, extra_json_schema={"description": description})


def _count(description: str, least: int, most: int = 2**31 - 1) -> Meta:
    return Meta(ge=least, le=most, extra_json_schema={"description": description})


def _list(description: str, most: int) -> Meta:
    return Meta(max_length=most, extra_json_schema={"description": description})


def _about(description: str) -> Meta:
    return Meta(extra_json_schema={"description": description})


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """Base of every object inside the spec."""


class Cache(Part, frozen=True):
    """Where a model that is downloaded is kept."""

    claim_name: Annotated[
        str,
        _text(
            "PersistentVolumeClaim that all pods share (ReadWriteMany, unless all run on one node). A Job loads "
            "the model into it.",
            _OBJECT_NAME,
            253,
        ),
    ] = ""
    host_path: Annotated[
        str,
        _text(
            "Folder that every node has and user 65532 may write to. The first worker on a node loads the model "
            "for the others. Pod security levels restricted and baseline forbid it.",
            r"^(/[A-Za-z0-9][-A-Za-z0-9._]*)+$",
            1024,
        ),
    ] = ""


class Model(Part, frozen=True):
    """The model to serve."""

    uri: Annotated[
        str,
        _text(
            "hf://org/name@revision, pvc://claim/path, file:///path or package://name.",
            r"^(hf|pvc|file|package)://.+$",
            1024,
        ),
    ]
    name: Annotated[
        str,
        _text(
            "Name by which clients ask for the model. Default: the InferenceService's own name.",
            r"^[A-Za-z0-9][-A-Za-z0-9._:/]*$",
            253,
        ),
    ] = ""
    revision: Annotated[
        str, _text("Branch, tag or commit of an hf:// model.", r"^[A-Za-z0-9][-A-Za-z0-9._/]*$", 253)
    ] = ""
    max_length: Annotated[
        int, _count("Most tokens of one sequence, prompt and output together. 0: the model's own.", 0)
    ] = 0
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        _about("Type of weights, activations and KV cache. auto: bfloat16."),
    ] = "auto"
    size: Annotated[
        Quantity,
        _about(
            "Bytes of the weights, for example 16Gi: a pod that does not listen after the time that loading so "
            "much may take is restarted. Default: after an hour."
        ),
    ] = 0
    cache: Annotated[
        Cache,
        _about("Where a downloaded model is kept. Default: in each pod, as long as it lives."),
    ] = Cache()
    token_secret_name: Annotated[
        str,
        _text(
            "Secret whose key token holds the hub's access token, for private and gated models.", _OBJECT_NAME, 253
        ),
    ] = ""


class Resources(Part, frozen=True):
    """Requests and limits of the worker's container, over what Kvasir asks for itself."""

    requests: dict[str, Quantity] = {}
    limits: dict[str, Quantity] = {}


class Workers(Part, frozen=True):
    """One pool of workers."""

    replicas: Annotated[int, _count("Number of workers.", 0, 10_000)] = 1
    tensor_parallel: Annotated[
        int, _count("GPUs a worker splits the model over. It must divide the model's KV heads.", 1, 64)
    ] = 1
    device: Annotated[Device, _about("cuda: NVIDIA GPUs. cpu: no GPU, on any node.")] = "cuda"
    resources: Annotated[
        Resources,
        _about("Requests and limits of the worker's container, merged over Kvasir's own."),
    ] = Resources()
    template: Annotated[
        dict[str, Any],
        _about(
            "Pod template (metadata labels and annotations, spec) merged over the rendered one. Objects merge; "
            "containers, env, ports and mounts merge by name; other lists and volumes are replaced. The worker's "
            "container is called kvasir; its flags can be set as environment variables KVASIR_FLAG. A nodeSelector "
            "or nodeAffinity, also an empty one, takes the place of the affinity to H100 nodes."
        ),
    ] = {}


class Expose(Part, frozen=True):
    """How clients outside the cluster reach the router."""

    type: Annotated[
        Literal["Service", "Ingress", "HTTPRoute"],
        _about("Service: inside the cluster only. Ingress and HTTPRoute also give the /v1 paths to the outside."),
    ] = "Service"
    host: Annotated[str, _text("Host name of the Ingress or HTTPRoute. Default: any.", _HOST, 253)] = ""
    class_name: Annotated[
        str,
        _text("Ingress: the IngressClass. HTTPRoute: the Gateway, as name or namespace/name.", _CLASS_NAME, 253),
    ] = ""
    tls_secret_name: Annotated[
        str, _text("Ingress only: the Secret with the certificate; a Gateway has its own.", _OBJECT_NAME, 253)
    ] = ""


class Auth(Part, frozen=True):
    """Who may ask."""

    secret_name: Annotated[
        str,
        _text(
            "Secret whose values are API keys, one a key or one a line. Default: no key is asked for.",
            _OBJECT_NAME,
            253,
        ),
    ] = ""


class Router(Part, frozen=True):
    """The OpenAI endpoint."""

    replicas: Annotated[int, _count("Number of routers.", 0, 1000)] = 1
    expose: Annotated[Expose, _about("How clients outside the cluster reach the router.")] = Expose()
    auth: Annotated[Auth, _about("Who may ask.")] = Auth()


class Transfer(Part, frozen=True):
    """How KV travels from prefill to decode."""

    fabric: Annotated[
        Fabric,
        _about(
            "rdma, tcp, or shm (all workers on one node, in the node's IPC namespace). "
            "auto: RDMA where rdmaResource is named, else what UCX finds best."
        ),
    ] = "auto"
    rdma_resource: Annotated[
        str,
        _text("Extended resource that gives a pod an RDMA device, for example rdma/hca.", _RESOURCE_NAME, 253),
    ] = ""


def _limit(description: str) -> Meta:
    return Meta(extra_json_schema={"pattern": LIMIT, "description": description})


class Rollout(Part, frozen=True):
    """How workers of one revision give way to those of the next. The limits hold for each role."""

    max_surge: Annotated[
        int | str, _limit("Workers of a role beyond its replicas: a count, or a percentage of them, rounded up.")
    ] = 1
    max_unavailable: Annotated[
        int | str,
        _limit(
            "Workers of a role that may be missing: a count, or a percentage, rounded down. With 0 the paired "
            "capacity of prefill and decode never falls."
        ),
    ] = 0


class Drain(Part, frozen=True):
    """How a worker leaves."""

    deadline_seconds: Annotated[int, _count("Longest time to finish what runs before a pod ends.", 0, 86_400)] = 600


class Scaling(Part, frozen=True):
    """Who says how many workers there are."""

    mode: Annotated[
        Literal["Fixed", "External"],
        _about(
            "Fixed: each role's replicas. External: the replicas of the InferenceRoles NAME-prefill and "
            "NAME-decode, which begin with each role's replicas and have the scale subresource for kubectl scale, "
            "a HorizontalPodAutoscaler or KEDA."
        ),
    ] = "Fixed"


class Placement(Part, frozen=True):
    """Which nodes pods prefer."""

    topology_key: Annotated[
        str,
        _text(
            "Node label of a block (rack, fabric block) within which KV travels fast: workers are placed in the "
            "same block where there is room. Default: no preference.",
            _LABEL_KEY,
            253,
        ),
    ] = ""


class SecretReference(Part, frozen=True):
    """A Secret of the same namespace."""

    name: Annotated[str, _text("Name of the Secret.", _OBJECT_NAME, 253)]


class Spec(Part, frozen=True):
    """What is wanted."""

    model: Annotated[Model, _about("The model to serve.")]
    prefill: Annotated[Workers, _about("Workers that compute the prompts' KV cache.")] = Workers()
    decode: Annotated[Workers, _about("Workers that generate.")] = Workers()
    router: Annotated[Router, _about("The OpenAI endpoint.")] = Router()
    transfer: Annotated[Transfer, _about("How KV travels from prefill to decode.")] = Transfer()
    rollout: Annotated[Rollout, _about("How workers of one revision give way to the next.")] = Rollout()
    drain: Annotated[Drain, _about("How a worker leaves.")] = Drain()
    scaling: Annotated[Scaling, _about("Who says how many workers there are.")] = Scaling()
    placement: Annotated[Placement, _about("Which nodes pods prefer.")] = Placement()
    priority_class_name: Annotated[
        str, _text("PriorityClass of all pods. Default: the cluster's.", _OBJECT_NAME, 253)
    ] = ""
    image_pull_secrets: Annotated[
        list[SecretReference], _list("Secrets with which the engine's image is pulled.", 16)
    ] = []
    network_policy: Annotated[
        Literal["Restricted", "None"],
        _about(
            "Restricted: NetworkPolicies let workers talk to each other, to DNS and, where they download the "
            "model, to port 443; routers to workers, DNS and the API server; and only routers to workers. None: "
            "no NetworkPolicies are made."
        ),
    ] = "Restricted"

    def workers(self, role: "WorkerRole") -> Workers:
        """The pool of that role."""
        return self.prefill if role == "prefill" else self.decode


WorkerRole = Literal["prefill", "decode"]
WORKER_ROLES: tuple[WorkerRole, ...] = ("prefill", "decode")


class InferenceService(msgspec.Struct, frozen=True):
    """A valid InferenceService with all defaults filled in. `uid` is empty when no API server gave one."""

    name: str
    namespace: str
    spec: Spec
    uid: str = ""
    generation: int = 0

    @property
    def served_name(self) -> str:
        """The name by which clients ask for the model."""
        return self.spec.model.name or self.name


class InvalidService(ValueError):
    """An object that is no valid InferenceService. `problems` holds every reason, not only the first."""

    def __init__(self, problems: list[Invalid]) -> None:
        super().__init__("; ".join(str(problem) for problem in problems))
        self.problems = problems


def object_schema() -> Schema:
    """The schema of the object without its status. Of metadata, a CRD can only restrict the name."""
    return {
        "type": "object",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {
                "type": "object",
                "properties": {"name": {"type": "string", "maxLength": NAME_LENGTH, "pattern": NAME_PATTERN}},
            },
            "spec": {**structural(Spec), "description": "What is wanted."},
        },
    }


_SCHEMA = object_schema()


def parse(document: Mapping[str, Any], default_namespace: str = "default") -> InferenceService:
    """The InferenceService that `document` describes. Raises InvalidService with every problem found."""
    found = list(_envelope_problems(document))
    if not found:
        found = list(problems(_SCHEMA["properties"]["spec"], document["spec"], "spec"))
    if found:
        raise InvalidService(found)
    metadata = document["metadata"]
    service = InferenceService(
        name=metadata["name"],
        namespace=metadata.get("namespace") or default_namespace,
        uid=metadata.get("uid", ""),
        generation=metadata.get("generation", 0),
        spec=msgspec.convert(document["spec"], Spec),
    )
    if found := list(semantic_problems(service)):
        raise InvalidService(found)
    return service


def _envelope_problems(document: Mapping[str, Any]) -> list[Invalid]:
    if not isinstance(document, Mapping):
        return [Invalid("", "must be an object")]
    found = []
    for field, expected in (("apiVersion", API_VERSION), ("kind", KIND)):
        if document.get(field) != expected:
            found.append(Invalid(field, f"must be {expected}, is {document.get(field)!r}"))
    metadata = document.get("metadata")
    if not isinstance(metadata, Mapping) or "name" not in metadata:
        found.append(Invalid("metadata.name", "is required"))
    else:
        found.extend(_name_problems(metadata["name"]))
    if "spec" not in document:
        found.append(Invalid("spec", "is required"))
    found.extend(
        Invalid(field, "unknown field")
        for field in document
        if field not in ("apiVersion", "kind", "metadata", "spec", "status")
    )
    return found


def _name_problems(name: object) -> list[Invalid]:
    found = list(problems(_SCHEMA["properties"]["metadata"]["properties"]["name"], name, "metadata.name"))
    return [Invalid(p.path, f"{p.reason}: Services and Deployments are named after it") for p in found]
