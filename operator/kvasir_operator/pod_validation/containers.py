"""Validates one container: its ports, mounts, probes and claims."""

from collections.abc import Iterator, Mapping
from typing import Any

from kvasir_operator.pod_validation.path import Path, Problem, shown
from kvasir_operator.pod_validation.resources import resource_problems

PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
_FIELDS = ("metadata.name", "metadata.namespace", "metadata.uid", "spec.nodeName", "spec.serviceAccountName")
_ADDRESSES = ("status.hostIP", "status.hostIPs", "status.podIP", "status.podIPs")
_MEASURES = tuple(f"{kind}.{what}" for kind in ("limits", "requests") for what in ("cpu", "memory"))


def container_problems(
    container: Mapping[str, Any], path: Path, volumes: set[str], claims: set[str], restarts: bool
) -> Iterator[Problem]:
    """Problems of a container whose types are right. `restarts`: it runs as long as the pod does."""
    if not container.get("image"):
        yield Problem(
            (*path, "image"),
            "is required: no container of ours has this name, and another one needs its own image "
            "(the worker's container is called kvasir)",
        )
    yield from _ports(container, path)
    yield from _mounts(container, path, volumes)
    yield from _env(container, path)
    yield from _probes(container, path, restarts)
    yield from resource_problems(container.get("resources", {}), (*path, "resources"))
    yield from _claims(container, path, claims)
    yield from _security(container, path)


def twice(items: list[Any], keys: tuple[str, ...], path: Path) -> Iterator[Problem]:
    """The items that repeat the keys of an item before."""
    seen = set()
    for index, item in enumerate(items):
        found = tuple(item.get(key, "TCP" if key == "protocol" else None) for key in keys)
        if found in seen:
            yield Problem((*path, index, keys[0]), f"{shown(found[0])} is there twice")
        seen.add(found)


def _ports(container: Mapping[str, Any], path: Path) -> Iterator[Problem]:
    ports = container.get("ports", [])
    yield from twice(ports, ("containerPort", "protocol"), (*path, "ports"))
    names = [(index, port["name"]) for index, port in enumerate(ports) if port.get("name")]
    for place, (index, name) in enumerate(names):
        if name in [other for _, other in names[:place]]:
            yield Problem((*path, "ports", index, "name"), f"{name!r} is there twice")


def _mounts(container: Mapping[str, Any], path: Path, volumes: set[str]) -> Iterator[Problem]:
    for field, key in (("volumeMounts", "mountPath"), ("volumeDevices", "devicePath")):
        mounts = container.get(field, [])
        yield from twice(mounts, (key,), (*path, field))
        for index, mount in enumerate(mounts):
            where = (*path, field, index)
            if mount["name"] not in volumes:
                yield Problem((*where, "name"), f"no volume is called {mount['name']!r}")
            if ":" in mount[key]:
                yield Problem((*where, key), "may have no colon")


def _env(container: Mapping[str, Any], path: Path) -> Iterator[Problem]:
    variables = container.get("env", [])
    yield from twice(variables, ("name",), (*path, "env"))
    for index, variable in enumerate(variables):
        where = (*path, "env", index, "valueFrom")
        source = variable.get("valueFrom", {})
        if reference := source.get("fieldRef"):
            field = reference["fieldPath"]
            keyed = field.endswith("']") and field.startswith(("metadata.labels['", "metadata.annotations['"))
            if field not in (*_FIELDS, *_ADDRESSES) and not keyed:
                known = ", ".join((*_FIELDS, *_ADDRESSES, "metadata.labels['KEY'], metadata.annotations['KEY']"))
                yield Problem((*where, "fieldRef", "fieldPath"), f"{field!r} cannot be had; known are {known}")
        if measure := source.get("resourceFieldRef"):
            name = measure["resource"]
            if name not in _MEASURES and not name.partition(".")[2].startswith(("ephemeral-storage", "hugepages-")):
                yield Problem((*where, "resourceFieldRef", "resource"), f"{name!r} is not one of {_MEASURES}")


def _probes(container: Mapping[str, Any], path: Path, restarts: bool) -> Iterator[Problem]:
    names = {port.get("name") for port in container.get("ports", [])}
    hooks = container.get("lifecycle", {})
    handlers = [((*path, kind), container[kind]) for kind in PROBES if kind in container]
    handlers += [((*path, "lifecycle", kind), hooks[kind]) for kind in ("postStart", "preStop") if kind in hooks]
    for where, found in handlers:
        if not restarts:
            yield Problem(where, "an init container that ends has no probes and no lifecycle")
        for kind in ("httpGet", "tcpSocket"):
            port = found.get(kind, {}).get("port")
            if isinstance(port, str) and port not in names:
                yield Problem((*where, kind, "port"), f"no port of the container is called {port!r}")
        if "exec" in found and not found["exec"].get("command"):
            yield Problem((*where, "exec", "command"), "is required")
        if where[-1] in ("startupProbe", "livenessProbe") and found.get("successThreshold", 1) != 1:
            yield Problem((*where, "successThreshold"), f"must be 1, is {found['successThreshold']}")
        if where[-1] == "readinessProbe" and "terminationGracePeriodSeconds" in found:
            yield Problem((*where, "terminationGracePeriodSeconds"), "a readiness probe ends nothing")


def _claims(container: Mapping[str, Any], path: Path, claims: set[str]) -> Iterator[Problem]:
    used = container.get("resources", {}).get("claims", [])
    yield from twice(used, ("name",), (*path, "resources", "claims"))
    for index, claim in enumerate(used):
        if claim["name"] not in claims:
            where = (*path, "resources", "claims", index, "name")
            yield Problem(where, f"no entry of the pod's resourceClaims is called {claim['name']!r}")


def _security(container: Mapping[str, Any], path: Path) -> Iterator[Problem]:
    context = container.get("securityContext", {})
    if context.get("allowPrivilegeEscalation", True):
        return
    where = (*path, "securityContext")
    if context.get("privileged"):
        yield Problem((*where, "privileged"), "needs allowPrivilegeEscalation: true beside it")
    if {"SYS_ADMIN", "CAP_SYS_ADMIN"} & set(context.get("capabilities", {}).get("add", [])):
        yield Problem((*where, "capabilities", "add"), "SYS_ADMIN needs allowPrivilegeEscalation: true beside it")
