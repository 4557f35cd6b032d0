"""Validates a container's resources: names, amounts, and requests against limits."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from kvasir_engine.quantity import amount
from kvasir_operator.pod_validation.path import Path, Problem
from kvasir_operator.pod_validation.tables import QUALIFIED

_HUGE = "hugepages-"
_PLAIN = ("cpu", "memory", "ephemeral-storage")


def extended(name: str) -> bool:
    """Whether it is an extended resource, such as a device plugin's: whole amounts, requests equal to limits."""
    domain, slash, _ = name.rpartition("/")
    return bool(slash) and not f".{domain}".endswith(".kubernetes.io")


def resource_problems(resources: Mapping[str, Any], path: Path) -> Iterator[Problem]:
    """Problems of a container's requests and limits, whose types are right."""
    requests, limits = resources.get("requests", {}), resources.get("limits", {})
    for kind, amounts in (("requests", requests), ("limits", limits)):
        for name, value in amounts.items():
            yield from _amount(name, value, (*path, kind, name))
    for name in requests:
        yield from _both(name, requests[name], limits.get(name), path)
    names = {*requests, *limits}
    for name in sorted(each for each in names if each.startswith(_HUGE)):
        if not names & {"cpu", "memory"}:
            kind = "limits" if name in limits else "requests"
            yield Problem((*path, kind, name), "huge pages need a request or limit of cpu or memory beside them")


def _amount(name: str, value: Any, path: Path) -> Iterator[Problem]:
    number = amount(value)
    if number is None or number < 0:
        yield Problem(path, f"must be a quantity that is not negative, is {value!r}")
        return
    if not _known(name):
        yield Problem(path, "no resource: cpu, memory, ephemeral-storage, hugepages-SIZE, or domain/name")
    elif name != "cpu" and number != number.to_integral_value():
        what = "whole devices" if extended(name) else "whole bytes (400Mi, not 400m)"
        yield Problem(path, f"there are {what} only, is {value}")


def _known(name: str) -> bool:
    if "/" not in name:
        return name in _PLAIN or bool(re.fullmatch(rf"{_HUGE}[1-9][0-9]*([KMGTPE]i)?", name))
    return bool(QUALIFIED.fullmatch(name)) and extended(name) and not name.startswith("requests.")


def _both(name: str, request: Any, limit: Any, path: Path) -> Iterator[Problem]:
    where = (*path, "requests", name)
    whole = extended(name) or name.startswith(_HUGE)
    if limit is None:
        if whole:
            yield Problem((*path, "limits", name), f"must be there and equal the request, {request}")
        return
    requested, allowed = amount(request), amount(limit)
    if requested is None or allowed is None:
        return
    if whole and requested != allowed:
        yield Problem(where, f"must equal the limit, {limit}; is {request}")
    elif requested > allowed:
        yield Problem(where, f"{request} is more than the limit, {limit}")
