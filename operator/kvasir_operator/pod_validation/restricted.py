"""The controls that the level restricted of the Pod Security Standards adds to baseline: no root, no way to it."""

from collections.abc import Iterator, Mapping
from typing import Any

from kvasir_operator.pod_validation.baseline import CAPABILITIES, SECCOMP, containers, security_context
from kvasir_operator.pod_validation.path import Path, Problem, shown

VOLUMES = (
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
)
_MAY_ADD = "NET_BIND_SERVICE"

Fields = Mapping[str, Any]


def restricted_problems(template: Fields) -> Iterator[Problem]:
    """What the level restricted refuses beside what baseline does, by its field."""
    spec = template["spec"]
    yield from _volumes(spec)
    pod = security_context(spec)
    if pod.get("runAsUser") == 0:
        yield Problem(("spec", "securityContext", "runAsUser"), "must not be 0")
    for path, container in containers(spec):
        yield from _container(pod, security_context(container), (*path, "securityContext"))


def _volumes(spec: Fields) -> Iterator[Problem]:
    for index, volume in enumerate(spec.get("volumes") or []):
        for kind in volume:
            if kind not in ("name", "hostPath", *VOLUMES):
                yield Problem(("spec", "volumes", index, kind), f"a volume must be one of {', '.join(VOLUMES)}")


def _container(pod: Fields, context: Fields, path: Path) -> Iterator[Problem]:
    if context.get("allowPrivilegeEscalation") is not False:
        yield Problem((*path, "allowPrivilegeEscalation"), "must be false")
    non_root = context.get("runAsNonRoot")
    if (pod.get("runAsNonRoot") if non_root is None else non_root) is not True:
        yield Problem((*path, "runAsNonRoot"), "must be true")
    if context.get("runAsUser") == 0:
        yield Problem((*path, "runAsUser"), "must not be 0")
    # One that is there and another is baseline's to refuse.
    if not (context.get("seccompProfile") or pod.get("seccompProfile")):
        yield Problem((*path, "seccompProfile", "type"), f"must be {' or '.join(SECCOMP)}")
    capabilities = context.get("capabilities") or {}
    if "ALL" not in (capabilities.get("drop") or []):
        yield Problem((*path, "capabilities", "drop"), "must have ALL")
    for index, name in enumerate(capabilities.get("add") or []):
        if name in CAPABILITIES and name != _MAY_ADD:
            yield Problem((*path, "capabilities", "add", index), f"may add only {_MAY_ADD}, not {shown(name)}")
