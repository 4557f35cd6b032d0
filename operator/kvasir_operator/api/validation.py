"""What a schema cannot say about an InferenceService: combinations of fields, and facts about the model. Pure."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from kvasir_engine.environment import ROUTER
from kvasir_engine.model.loading.uri import ClaimURI, FileURI, HubURI, ModelURI, ModelURIError
from kvasir_engine.model.loading.uri import parse as parse_uri
from kvasir_operator.api.kinds import GROUPED_NAME_LENGTH, SET_API_VERSION, SET_KIND
from kvasir_operator.api.kv_fingerprint import unpaired
from kvasir_operator.api.service import WORKER_ROLES
from kvasir_operator.api.strategic_merge import LISTS_BY_KEY, identity
from kvasir_operator.api.structural_schema import Invalid, join
from kvasir_operator.api.validation_derived import (
    PRELOAD_DERIVED,
    ROUTER_DERIVED,
    derived_problems,
    derived_template_problems,
    identity_problems,
    unknown_variables,
)
from kvasir_operator.api.validation_devices import device_problems
from kvasir_operator.api.validation_gang import gang_problems
from kvasir_operator.api.validation_scaling import scaling_problems
from kvasir_operator.api.validation_settings import settings_problems

if TYPE_CHECKING:
    from kvasir_operator.api import Engine, Expose, InferenceService, Model, Rollout, Transfer, Workers

GPUS_OF_A_NODE = 8
CA_VARIABLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
OWN_LABELS = ("app.kubernetes.io/", "serving.kvasir.dev/", "leaderworkerset.sigs.k8s.io/")


class ModelMetadata(msgspec.Struct, frozen=True):
    """What is known of a model before it is loaded, from its config.json."""

    heads: int
    kv_heads: int
    max_positions: int


_ANNOTATION = r"([a-z0-9]([-.a-z0-9]*[a-z0-9])?/)?[A-Za-z0-9]([-._A-Za-z0-9]*[A-Za-z0-9])?"


def semantic_problems(service: "InferenceService") -> Iterator[Invalid]:
    """Problems of a service that its schema allows, without looking at the model."""
    spec = service.spec
    yield from _model(spec.model)
    for role, workers in (("prefill", spec.prefill), ("decode", spec.decode)):
        yield from _workers(workers, f"spec.{role}")
        yield from derived_problems(workers, f"spec.{role}", spec.drain.deadline_seconds)
    found = [problem for role in WORKER_ROLES for problem in settings_problems(spec, role)]
    yield from dict.fromkeys(found)  # of what holds for both roles, once
    yield from _groups(service)
    yield from gang_problems(spec)
    yield from template_problems(spec.router.template, "spec.router.template")
    yield from unknown_variables(spec.router.template, "spec.router.template", ROUTER)
    yield from derived_template_problems(
        spec.router.template, "spec.router.template", ROUTER_DERIVED, spec.drain.deadline_seconds
    )
    yield from identity_problems(spec.router.template, "spec.router.template")
    yield from _engine(spec.engine)
    yield from _expose(spec.router.expose)
    yield from _transfer(spec.transfer)
    yield from _rollout(spec.rollout)
    yield from scaling_problems(spec)
    for path, reason in unpaired(spec):
        yield Invalid(path, reason)


def model_problems(service: "InferenceService", model_metadata: ModelMetadata | None) -> list[Invalid]:
    """Problems of a service with its model. Nothing is refused for a model that nothing is known about."""
    if model_metadata is None:
        return []
    spec, found = service.spec, []
    for role, workers in (("prefill", spec.prefill), ("decode", spec.decode)):
        problem = _undivided(model_metadata, workers.tensor_parallel)
        if problem:
            found.append(Invalid(f"spec.{role}.tensorParallel", f"{workers.tensor_parallel} {problem}"))
    if spec.model.max_length > model_metadata.max_positions:
        found.append(
            Invalid(
                "spec.model.maxLength",
                f"{spec.model.max_length} is more than the model's {model_metadata.max_positions} positions",
            )
        )
    return found


def _undivided(model_metadata: ModelMetadata, ranks: int) -> str:
    """Why a worker cannot divide the model among its ranks (`model/tensor_parallel.py` does), or nothing."""
    if model_metadata.heads % ranks:
        return f"does not divide the model's {model_metadata.heads} attention heads"
    if model_metadata.kv_heads % ranks and ranks % model_metadata.kv_heads:
        return f"neither divides the model's {model_metadata.kv_heads} KV heads nor is a multiple of them"
    return ""


def _model(model: "Model") -> Iterator[Invalid]:
    try:
        uri = parse_uri(model.uri)
    except ModelURIError as error:
        yield Invalid("spec.model.uri", str(error))
        return
    yield from _source(model, uri)
    if not model.revision:
        return
    if not isinstance(uri, HubURI):
        yield Invalid("spec.model.revision", f"only hf:// models have revisions, the uri is {model.uri}")
    elif uri.revision and uri.revision != model.revision:
        yield Invalid("spec.model.revision", f"{model.revision!r} contradicts the uri's {uri.revision!r}")


def _source(model: "Model", uri: ModelURI) -> Iterator[Invalid]:
    cache = model.cache
    if cache.claim_name and cache.host_path:
        yield Invalid("spec.model.cache", "has both claimName and hostPath; one of them is used")
    if (cache.claim_name or cache.host_path) and isinstance(uri, ClaimURI | FileURI):
        yield Invalid("spec.model.cache", f"nothing is downloaded, the uri is {model.uri}")
    if cache.preload.is_set and (not cache.claim_name or isinstance(uri, ClaimURI | FileURI)):
        yield Invalid("spec.model.cache.preload", "means nothing without cache.claimName: no Job loads the model")
    path, template = "spec.model.cache.preload.template", cache.preload.template
    yield from template_problems(template, path)
    yield from unknown_variables(template, path, frozenset())
    yield from derived_template_problems(template, path, PRELOAD_DERIVED)
    if isinstance(spec := template.get("spec"), Mapping) and "restartPolicy" in spec:
        yield Invalid(f"{path}.spec.restartPolicy", "is the operator's own, OnFailure")
    if model.token_secret_name and not isinstance(uri, HubURI):
        yield Invalid("spec.model.tokenSecretName", f"only hf:// models need a token, the uri is {model.uri}")


def _workers(workers: "Workers", path: str) -> Iterator[Invalid]:
    if workers.tensor_parallel % workers.nodes:
        yield Invalid(f"{path}.nodes", f"{workers.nodes} does not divide tensorParallel, {workers.tensor_parallel}")
    elif workers.device == "cuda" and workers.ranks_per_pod > GPUS_OF_A_NODE:
        of_each = f" / nodes {workers.nodes}" if workers.nodes > 1 else ""
        yield Invalid(
            f"{path}.tensorParallel",
            f"{workers.tensor_parallel}{of_each} GPUs are more than the {GPUS_OF_A_NODE} of a node: divide the "
            "worker among more nodes",
        )
    yield from device_problems(workers, path)
    yield from template_problems(workers.template, f"{path}.template")


def _groups(service: "InferenceService") -> Iterator[Invalid]:
    """Problems of workers over several nodes."""
    spec = service.spec
    for role, workers in (("prefill", spec.prefill), ("decode", spec.decode)):
        if workers.nodes == 1:
            continue
        if spec.transfer.fabric == "shm":
            yield Invalid(f"spec.{role}.nodes", "fabric shm keeps all workers on one node")
        if len(service.name) > GROUPED_NAME_LENGTH:
            yield Invalid(
                "metadata.name",
                f"may have at most {GROUPED_NAME_LENGTH} characters with {role}.nodes above 1: the StatefulSets of "
                "LeaderWorkerSets are named after it",
            )


def api_problems(service: "InferenceService", groups_served: Callable[[], bool]) -> list[Invalid]:
    """What a service asks of its cluster that is not there. `groups_served` is asked where it matters: whether
    LeaderWorkerSet is installed."""
    spec = service.spec
    return [
        Invalid(
            f"spec.{role}.nodes",
            f"{workers.nodes} takes {SET_API_VERSION}, which this cluster does not serve: install {SET_KIND}",
        )
        for role, workers in (("prefill", spec.prefill), ("decode", spec.decode))
        if workers.nodes > 1 and not groups_served()
    ]


def template_problems(template: Mapping[str, Any], path: str) -> Iterator[Invalid]:
    """Problems of a pod template overlay: what could not be merged, or would cut a pod off from its owner."""
    for name in template:
        if name not in ("metadata", "spec"):
            yield Invalid(join(path, name), "unknown field; known are metadata, spec")
    metadata, spec = template.get("metadata", {}), template.get("spec", {})
    if not isinstance(metadata, Mapping):
        yield Invalid(f"{path}.metadata", "must be an object")
    else:
        yield from _template_metadata(metadata, f"{path}.metadata")
    if not isinstance(spec, Mapping):
        yield Invalid(f"{path}.spec", "must be an object")
    else:
        yield from _mergeable(spec, f"{path}.spec")


def _template_metadata(metadata: Mapping[str, Any], path: str) -> Iterator[Invalid]:
    for field, values in metadata.items():
        if field not in ("labels", "annotations"):
            yield Invalid(join(path, field), "unknown field; known are annotations, labels")
            continue
        if not isinstance(values, Mapping):
            yield Invalid(join(path, field), "must be an object")
            continue
        for key, value in values.items():
            where = join(join(path, field), key)
            if not isinstance(value, str):
                yield Invalid(where, f"must be a string, is {value!r}")
            if field == "labels" and key.startswith(OWN_LABELS):
                yield Invalid(where, "this label is Kvasir's own: pods are found by it")


def _mergeable(value: Any, path: str) -> Iterator[Invalid]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            where = join(path, name)
            if name.startswith("$"):
                yield Invalid(where, "strategic merge directives are not known here")
            elif name in LISTS_BY_KEY:
                yield from _keyed(item, name, where)
            else:
                yield from _mergeable(item, where)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _mergeable(item, f"{path}[{index}]")
    elif value is None:
        yield Invalid(path, "null does not survive kubectl apply; give an empty value instead")


def _keyed(items: Any, name: str, path: str) -> Iterator[Invalid]:
    key = LISTS_BY_KEY[name]
    if not isinstance(items, list):
        yield Invalid(path, "must be a list")
        return
    seen = set()
    for index, item in enumerate(items):
        where = f"{path}[{index}]"
        if not isinstance(item, Mapping) or not all(isinstance(each, str | int) for each in identity(name, item)):
            yield Invalid(where, f"must be an object with {key}, by which it is merged")
            continue
        if identity(name, item) in seen:
            yield Invalid(where, f"{key} {item[key]!r} is there twice")
        seen.add(identity(name, item))
        yield from _mergeable(item, where)


def _engine(engine: "Engine") -> Iterator[Invalid]:
    seen = set()
    for index, each in enumerate(engine.env):
        path = f"spec.engine.env[{index}].name"
        if each.name.startswith("KVASIR_"):
            yield Invalid(path, f"{each.name} is Kvasir's own: the workers' settings are fields of engine")
        elif each.name in CA_VARIABLES and engine.ca_config_map_name:
            yield Invalid(path, f"{each.name} is set by caConfigMapName")
        if each.name in seen:
            yield Invalid(path, f"{each.name} is there twice")
        seen.add(each.name)


def _expose(expose: "Expose") -> Iterator[Invalid]:
    path = "spec.router.expose"
    for key in expose.annotations:
        if not re.fullmatch(_ANNOTATION, key) or len(key.rpartition("/")[2]) > 63:
            yield Invalid(join(f"{path}.annotations", key), "is no name of an annotation")
        elif key.startswith(("serving.kvasir.dev/", "kubectl.kubernetes.io/")):
            yield Invalid(join(f"{path}.annotations", key), "this annotation is not a user's")
    if expose.type == "Service":
        for field, value in (
            ("host", expose.host),
            ("className", expose.class_name),
            ("tlsSecretName", expose.tls_secret_name),
        ):
            if value:
                yield Invalid(f"{path}.{field}", "means nothing with type Service; use Ingress or HTTPRoute")
    if expose.type == "Ingress" and "/" in expose.class_name:
        yield Invalid(f"{path}.className", "the name of an IngressClass has no slash")
    if expose.type == "HTTPRoute" and not expose.class_name:
        yield Invalid(f"{path}.className", "an HTTPRoute needs its Gateway here, as name or namespace/name")
    if expose.type in ("HTTPRoute", "InferencePool") and expose.tls_secret_name:
        yield Invalid(f"{path}.tlsSecretName", "an HTTPRoute's certificate belongs to its Gateway")
    if expose.type == "InferencePool":
        if expose.host and not expose.class_name:
            yield Invalid(f"{path}.host", "belongs to an HTTPRoute, for which className names the Gateway")
        if expose.endpoint_picker is None:
            yield Invalid(f"{path}.endpointPicker", "an InferencePool needs the Service of its endpoint picker")
    elif expose.endpoint_picker is not None:
        yield Invalid(f"{path}.endpointPicker", "means nothing without type InferencePool")


def _transfer(transfer: "Transfer") -> Iterator[Invalid]:
    path = "spec.transfer.rdmaResource"
    if transfer.fabric == "rdma" and not transfer.rdma_resource:
        yield Invalid(path, "fabric rdma needs the extended resource that gives a pod its RDMA device")
    if transfer.fabric in ("tcp", "shm") and transfer.rdma_resource:
        yield Invalid(path, f"means nothing with fabric {transfer.fabric}")
    if transfer.encryption == "Required" and transfer.fabric != "shm":
        reason = f"Required takes fabric shm: over {transfer.fabric} KV is not encrypted on its way"
        yield Invalid("spec.transfer.encryption", reason)


def _rollout(rollout: "Rollout") -> Iterator[Invalid]:
    if all(str(each).rstrip("%").strip("0") == "" for each in (rollout.max_surge, rollout.max_unavailable)):
        yield Invalid("spec.rollout.maxUnavailable", "may not be 0 when maxSurge is 0: nothing could ever change")
