"""What the operator derives from the spec, templates may not say again: probes and flags would part. Pure.

Nor may they say variables KVASIR_* that nothing reads.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from kvasir_engine.environment import PROCESS, WORKER, why_unknown
from kvasir_operator.api.kinds import CONTAINER
from kvasir_operator.api.structural_schema import Invalid, join

if TYPE_CHECKING:
    from kvasir_operator.api import Workers

_PREFIX = "KVASIR_"
_FIXED = "is the same in every pod: probes, Services and NetworkPolicies count on it"
_TLS_PATH, _TLS_VOLUME = "/etc/kvasir/tls", "tls"
_PORTS = {"http": 8000, "worker": 8443}
# The worker's flags that the operator sets, each also a variable, and what sets them.
DERIVED = {
    "role": "is set by spec.prefill and spec.decode",
    "port": _FIXED,
    "host": _FIXED,
    "cache": "is the mounted volume: use spec.model.cache",
    "model": "use spec.model.uri",
    "revision": "use spec.model.revision",
    "served-model-name": "use spec.model.name",
    "max-length": "use spec.model.maxLength",
    "dtype": "use spec.model.dtype",
    "device": "use {role}.device",
    "tensor-parallel": "use {role}.tensorParallel",
    "nnodes": "use {role}.nodes",
    "node-rank": "use {role}.nodes",
    "dist-init-addr": "use {role}.nodes",
    "fabric": "use spec.transfer.fabric",
    "tls-dir": "is the mounted Secret: use spec.transfer.encryption",
    "worker-port": _FIXED,
    "encryption": "use spec.transfer.encryption",
    "drain-seconds": "use spec.drain.deadlineSeconds",
}


ROUTER_DERIVED = {
    **{flag: DERIVED[flag] for flag in ("port", "host", "model", "revision", "served-model-name", "max-length")},
    "cache": DERIVED["cache"],
    "drain-seconds": DERIVED["drain-seconds"],
    "watch-pods": "is how workers are found",
    "worker": "is how workers are found: the router watches their pods",
    "watch-owner": "is how workers are found",
    "plain-workers": "use spec.transfer.encryption",
    "tls-dir": DERIVED["tls-dir"],
    "namespace": "is the service's own",
    "api-keys-file": "use spec.router.auth.secretName",
    "hold-seconds": "use spec.scaling.auto.scaleToZero.holdSeconds",
    "hold-requests": "use spec.scaling.auto.scaleToZero.holdRequests",
}
PRELOAD_DERIVED = {"cache": DERIVED["cache"]}


def derived_template_problems(
    template: Mapping[str, Any], path: str, derived: Mapping[str, str], grace: int = 0
) -> Iterator[Invalid]:
    """Problems of the template at `path`, in whose container `derived` flags are the operator's. `grace`: the
    seconds that a pod has to leave."""
    spec = template.get("spec")
    if not isinstance(spec, Mapping):
        return
    given = spec.get("terminationGracePeriodSeconds")
    if isinstance(given, int) and given < grace:
        yield Invalid(
            f"{path}.spec.terminationGracePeriodSeconds",
            f"{given} is less than a drain may take, {grace}: use spec.drain.deadlineSeconds",
        )
    containers = spec.get("containers")
    for index, container in enumerate(containers if isinstance(containers, list) else ()):
        if isinstance(container, Mapping) and container.get("name") == CONTAINER:
            yield from _container(container, f"{path}.spec.containers[{index}]", path.rpartition(".")[0], derived)


def derived_problems(workers: "Workers", role: str, grace: int) -> Iterator[Invalid]:
    """Problems of the role at the path `role`. `grace`: the seconds that a pod has to leave."""
    yield from unknown_variables(workers.template, f"{role}.template", WORKER)
    yield from identity_problems(workers.template, f"{role}.template")
    yield from derived_template_problems(workers.template, f"{role}.template", DERIVED, grace)


def unknown_variables(template: Mapping[str, Any], path: str, flags: frozenset[str]) -> Iterator[Invalid]:
    """Variables KVASIR_* of a template's container kvasir that are none of `flags` and that no process reads."""
    spec = template.get("spec")
    containers = spec.get("containers") if isinstance(spec, Mapping) else None
    for index, container in enumerate(containers if isinstance(containers, list) else ()):
        if not isinstance(container, Mapping) or container.get("name") != CONTAINER:
            continue
        variables = container.get("env")
        for place, variable in enumerate(variables if isinstance(variables, list) else ()):
            name = variable.get("name") if isinstance(variable, Mapping) else None
            reason = why_unknown(name, flags | PROCESS) if isinstance(name, str) else None
            if reason is not None:
                yield Invalid(f"{path}.spec.containers[{index}].env[{place}].name", reason)


def identity_problems(template: Mapping[str, Any], path: str) -> Iterator[Invalid]:
    """Template fields that would give a pod another certificate, or ports that others do not expect."""
    spec = template.get("spec")
    if not isinstance(spec, Mapping):
        return
    for index, volume in enumerate(_items(spec.get("volumes"))):
        if volume.get("name") == _TLS_VOLUME:
            yield Invalid(f"{path}.spec.volumes[{index}].name", f"{_TLS_VOLUME} is Kvasir's own volume")
    for index, container in enumerate(_items(spec.get("containers"))):
        if container.get("name") != CONTAINER:
            continue
        at = f"{path}.spec.containers[{index}]"
        for place, mount in enumerate(_items(container.get("volumeMounts"))):
            where = str(mount.get("mountPath", "")).rstrip("/")
            if where == _TLS_PATH or where.startswith(f"{_TLS_PATH}/"):
                yield Invalid(f"{at}.volumeMounts[{place}].mountPath", f"{_TLS_PATH} has the pod's certificate")
            elif mount.get("name") == _TLS_VOLUME:
                yield Invalid(f"{at}.volumeMounts[{place}].name", f"{_TLS_VOLUME} is Kvasir's own volume")
        for place, port in enumerate(_items(container.get("ports"))):
            name, number = port.get("name"), port.get("containerPort")
            if isinstance(name, str) and number is not None and number != _PORTS.get(name, number):
                yield Invalid(f"{at}.ports[{place}].containerPort", f"port {name} {_FIXED}")


def _items(found: Any) -> list[Mapping[str, Any]]:
    """The items of a list, at their indices; {} for one that is no object."""
    return [each if isinstance(each, Mapping) else {} for each in found] if isinstance(found, list) else []


def _container(container: Mapping[str, Any], path: str, role: str, derived: Mapping[str, str]) -> Iterator[Invalid]:
    for field in ("command", "args"):
        if field in container:
            reason = "is the operator's own" if field == "command" else "are the operator's own"
            if field == "args" and derived is DERIVED:
                reason += f"; further flags go into {role}.engine.extraArgs"
            yield Invalid(join(path, field), reason)
    variables = container.get("env")
    for index, variable in enumerate(variables if isinstance(variables, list) else ()):
        name = variable.get("name") if isinstance(variable, Mapping) else None
        if isinstance(name, str) and name.startswith(_PREFIX):
            flag = name.removeprefix(_PREFIX).lower().replace("_", "-")
            if flag in derived:
                yield Invalid(f"{path}.env[{index}]", f"{name} {derived[flag].format(role=role)}")
