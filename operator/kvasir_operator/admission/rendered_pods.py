"""Finds what an API server, or the installer's policy, would refuse in a service's pods, by the spec's field."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from kvasir_operator.admission.features import of_feature
from kvasir_operator.api import WORKER_ROLES, InferenceService, WorkerRole, Workers
from kvasir_operator.api.kinds import CONTAINER
from kvasir_operator.api.strategic_merge import JOINED, LISTS_BY_KEY, identity
from kvasir_operator.api.structural_schema import Invalid, join
from kvasir_operator.api.workers import PodOverlay
from kvasir_operator.pod_validation import (
    Path,
    PodPolicy,
    Problem,
    pod_problems,
    policy_problems,
    type_problems,
)
from kvasir_operator.render.groups import worker_sets
from kvasir_operator.render.names import Object, Role, role_name
from kvasir_operator.render.options import Options
from kvasir_operator.render.preload import preload_job
from kvasir_operator.render.router import router_deployment
from kvasir_operator.render.workers import worker_deployment


def merged_problems(service: InferenceService, policy: PodPolicy) -> list[Invalid]:
    """Problems of all pods with the spec's templates and resources merged in. A pod that the spec does not
    customize has none of its own; `policy` judges it all the same."""
    found: dict[Invalid, None] = {}
    rdma = service.spec.transfer.rdma_resource
    for role in WORKER_ROLES:
        workers = service.spec.workers(role)
        for template in _templates(service, role, workers):
            wrong = list(pod_problems(template)) if _is_customized(service, workers) else []
            for problem in wrong:
                found[_located(problem, template, workers, f"spec.{role}", rdma)] = None
            judged = _judged(template, wrong, policy, role_name(service, role))
            found |= dict.fromkeys(_placed(service, judged, template, workers, f"spec.{role}", policy))
    for role_or_job, overrides, path, template in _others(service):
        wrong = list(pod_problems(template)) if _has_overrides(overrides) else []
        for problem in wrong:
            found[_located(problem, template, overrides, path, "")] = None
        account = role_name(service, role_or_job) if role_or_job else ""
        judged = _judged(template, wrong, policy, account)
        found |= dict.fromkeys(_placed(service, judged, template, overrides, path, policy))
    return list(found)


def _judged(template: Object, wrong: list[Problem], policy: PodPolicy, account: str) -> Iterable[Problem]:
    """What the policy says, of a pod whose types are right; what is wrong with types is refused by itself."""
    return () if wrong and any(type_problems(template)) else policy_problems(template, policy, account)


def _placed(
    service: InferenceService,
    problems: Iterable[Problem],
    template: Object,
    overrides: PodOverlay,
    root: str,
    policy: PodPolicy,
) -> Iterator[Invalid]:
    """The problems at the template's fields, and those of our own features at the features'."""
    for problem in problems:
        patch_path, rest = _in_template(problem.path, template, overrides.template)
        if rest and (feature := of_feature(problem, template, service)):
            if not feature.is_allowed(policy):
                yield feature.refusal
            continue
        yield Invalid(_text(f"{root}.template", (*patch_path, *rest)), problem.reason)


def _is_customized(service: InferenceService, workers: Workers) -> bool:
    """Whether the spec changes what Kvasir renders."""
    return _has_overrides(workers) or bool(service.spec.transfer.rdma_resource)


def _has_overrides(overrides: PodOverlay) -> bool:
    resources = overrides.resources
    return bool(
        overrides.template
        or resources.requests
        or resources.limits
        or resources.claims
        or overrides.resource_claims
    )


def _others(service: InferenceService) -> Iterator[tuple[Role | None, PodOverlay, str, Object]]:
    """The pods that are no workers: whose account they have, the overrides, their path in the spec, the rendered
    template."""
    router, preload = service.spec.router, service.spec.model.cache.preload
    yield "router", router, "spec.router", router_deployment(service, Options())["spec"]["template"]
    for job in preload_job(service, Options()):
        template = job["spec"]["template"]
        # A Job's pods end, unlike those that are judged here; the operator says so (`validation.py`).
        spec = {name: value for name, value in template["spec"].items() if name != "restartPolicy"}
        yield None, preload, "spec.model.cache.preload", {**template, "spec": spec}


def _templates(service: InferenceService, role: WorkerRole, workers: Workers) -> list[Object]:
    if workers.nodes == 1:
        return [worker_deployment(service, role, Options())["spec"]["template"]]
    group = worker_sets(service, role, Options())[0]["spec"]["leaderWorkerTemplate"]
    return [group["leaderTemplate"], group["workerTemplate"]]


def _located(problem: Problem, template: Object, workers: PodOverlay, root: str, rdma: str) -> Invalid:
    """The problem at the nearest field of the spec that causes it."""
    if found := _in_resources(problem.path, template, workers, root, rdma):
        return Invalid(found, problem.reason)
    patch_path, rest = _in_template(problem.path, template, workers.template)
    where = _text(f"{root}.template", patch_path)
    if len(rest) <= 2 and all(isinstance(step, str) for step in rest):  # what is to be there, and is not
        return Invalid(_text(where, rest), problem.reason)
    return Invalid(where, f"{_text('', rest)}: {problem.reason}")


def _in_resources(path: Path, template: Object, workers: PodOverlay, root: str, rdma: str) -> str:
    """The path in the spec's `resources` or `resourceClaims`; empty where neither sets it."""
    match path:
        case ("spec", "resourceClaims", int(index), *rest) if index < len(workers.resource_claims):
            return _text(root, ("resourceClaims", index, *rest))
        case ("spec", "containers", int(index), "resources", str(kind), *rest):
            if template["spec"]["containers"][index].get("name") != CONTAINER:
                return ""
            patch_path, _ = _in_template(path, template, workers.template)
            if len(patch_path) == len(path):
                return ""
            if kind == "claims":
                return _text(root, ("resources", kind, *rest))
            name = str(rest[0]) if rest else ""
            for each in (kind, "limits", "requests"):
                if name in getattr(workers.resources, each):
                    return _text(root, ("resources", each, name))
            return "spec.transfer.rdmaResource" if rdma and name == rdma else ""
    return ""


def _in_template(path: Path, merged: Any, patch: Any) -> tuple[Path, Path]:
    """The part of a merged path that is in the patch, in the patch's own indices, and the rest."""
    patch_path: list[str | int] = []
    field = ""
    for place, step in enumerate(path):
        if isinstance(step, int):
            index = _index(field, merged, step, patch)
            if index is None:
                return tuple(patch_path), path[place:]
            merged, patch = merged[step], patch[index]
            patch_path.append(index)
            continue
        if not isinstance(patch, Mapping) or step not in patch:
            return tuple(patch_path), path[place:]
        merged = merged.get(step) if isinstance(merged, Mapping) else None
        patch, field = patch[step], step
        patch_path.append(step)
    return tuple(patch_path), ()


def _index(field: str, merged: Any, step: int, patch: Any) -> int | None:
    """Which item of the patch's list a merged item comes from."""
    if not isinstance(patch, list):
        return None
    if field in JOINED:
        return patch.index(merged[step]) if merged[step] in patch else None
    if field not in LISTS_BY_KEY:
        return step if step < len(patch) else None
    key = identity(field, merged[step])
    return next((index for index, item in enumerate(patch) if identity(field, item) == key), None)


def _text(root: str, path: Path) -> str:
    for step in path:
        root = f"{root}[{step}]" if isinstance(step, int) else join(root, step)
    return root
