"""Validates what concerns several parts of a pod: names across containers, volumes, claims, labels, placement."""

import ipaddress
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from kvasir_operator.pod_validation.containers import container_problems, twice
from kvasir_operator.pod_validation.path import Path, Problem, shown
from kvasir_operator.pod_validation.placement import placement_problems
from kvasir_operator.pod_validation.tables import LABEL_VALUE, QUALIFIED
from kvasir_operator.pod_validation.types import type_problems

_ANNOTATIONS_BYTES = 256 * 1024


def pod_problems(template: Mapping[str, Any]) -> Iterator[Problem]:
    """The problems that an API server finds in a Deployment's pod template. Wrong types are reported alone."""
    if wrong := list(type_problems(template)):
        yield from wrong
        return
    yield from _metadata(template.get("metadata", {}), ("metadata",))
    spec = template.get("spec", {})
    yield from _names(spec)
    yield from _containers(spec)
    yield from _network(spec)
    yield from placement_problems(spec)


def _metadata(metadata: Mapping[str, Any], path: Path) -> Iterator[Problem]:
    for kind in ("labels", "annotations"):
        for key, value in metadata.get(kind, {}).items():
            where = (*path, kind, key)
            # API servers look at the keys of annotations in lower case.
            if not QUALIFIED.fullmatch(key.lower() if kind == "annotations" else key):
                yield Problem(
                    where, "no key: a name of at most 63 characters, a domain and a slash before it or not"
                )
            if kind == "labels" and not LABEL_VALUE.fullmatch(value):
                yield Problem(where, f"no label's value: at most 63 letters, digits, -, _ and ., is {shown(value)}")
    size = sum(len(each.encode()) for pair in metadata.get("annotations", {}).items() for each in pair)
    if size > _ANNOTATIONS_BYTES:
        yield Problem((*path, "annotations"), f"are {size} bytes, more than {_ANNOTATIONS_BYTES}")


def _names(spec: Mapping[str, Any]) -> Iterator[Problem]:
    for field in ("volumes", "resourceClaims", "imagePullSecrets", "schedulingGates"):
        yield from twice(spec.get(field, []), ("name",), ("spec", field))
    yield from twice(spec.get("hostAliases", []), ("ip",), ("spec", "hostAliases"))
    taken = {container["name"] for container in spec.get("containers", [])}
    yield from twice(spec.get("containers", []), ("name",), ("spec", "containers"))
    for index, container in enumerate(spec.get("initContainers", [])):
        if container["name"] in taken:
            where = ("spec", "initContainers", index, "name")
            yield Problem(where, f"{container['name']!r} is another container's name too")
        taken.add(container["name"])
    for field in ("ephemeralContainers",):
        if spec.get(field):
            yield Problem(("spec", field), "cannot be in a template")


def _containers(spec: Mapping[str, Any]) -> Iterator[Problem]:
    if not spec.get("containers"):
        yield Problem(("spec", "containers"), "needs at least one container")
    volumes = {volume["name"] for volume in spec.get("volumes", [])}
    claims = {claim["name"] for claim in spec.get("resourceClaims", [])}
    for field in ("containers", "initContainers"):
        for index, container in enumerate(spec.get(field, [])):
            restarts = field == "containers" or container.get("restartPolicy") == "Always"
            yield from container_problems(container, ("spec", field, index), volumes, claims, restarts)
    used = {
        claim["name"]
        for container in chain(spec.get("containers", []), spec.get("initContainers", []))
        for claim in container.get("resources", {}).get("claims", [])
    }
    for index, claim in enumerate(spec.get("resourceClaims", [])):
        if claim["name"] not in used:
            reason = "no container has it in its resources.claims, so none would see its devices"
            yield Problem(("spec", "resourceClaims", index), reason)


def _network(spec: Mapping[str, Any]) -> Iterator[Problem]:
    taken = set()
    for place, container in enumerate(spec.get("containers", [])):
        for index, port in enumerate(container.get("ports", [])):
            where = ("spec", "containers", place, "ports", index, "hostPort")
            host, number = port.get("hostPort"), port["containerPort"]
            if spec.get("hostNetwork"):
                if host not in (None, 0, number):
                    yield Problem(where, f"must equal containerPort, {number}, with hostNetwork; is {host}")
                host = number
            if not host:
                continue
            key = (host, port.get("protocol", "TCP"), port.get("hostIP", ""))
            if key in taken:
                yield Problem(where, f"port {host} of the node is another container's already")
            taken.add(key)
    for index, alias in enumerate(spec.get("hostAliases", [])):
        try:
            ipaddress.ip_address(alias["ip"])
        except ValueError:
            yield Problem(("spec", "hostAliases", index, "ip"), f"must be an IP address, is {alias['ip']!r}")
    if spec.get("dnsPolicy") == "None" and not spec.get("dnsConfig", {}).get("nameservers"):
        yield Problem(("spec", "dnsConfig", "nameservers"), "is required with dnsPolicy None")
    if spec.get("hostPID") and spec.get("shareProcessNamespace"):
        yield Problem(("spec", "shareProcessNamespace"), "hostPID is there too; only one of them can be")
