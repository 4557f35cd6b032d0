"""Validates where a pod may run: selectors, affinities, tolerations, spreading."""

from collections.abc import Iterator, Mapping
from typing import Any

from kvasir_operator.pod_validation.containers import twice
from kvasir_operator.pod_validation.path import Path, Problem, shown
from kvasir_operator.pod_validation.tables import LABEL_VALUE, QUALIFIED

_LISTED, _BARE, _COMPARED = ("In", "NotIn"), ("Exists", "DoesNotExist"), ("Gt", "Lt")


def placement_problems(spec: Mapping[str, Any]) -> Iterator[Problem]:
    """Problems of a pod's placement, whose types are right."""
    yield from _labels(spec.get("nodeSelector", {}), ("spec", "nodeSelector"))
    for index, toleration in enumerate(spec.get("tolerations", [])):
        yield from _toleration(toleration, ("spec", "tolerations", index))
    spreading = ("spec", "topologySpreadConstraints")
    yield from twice(spec.get(spreading[1], []), ("topologyKey", "whenUnsatisfiable"), spreading)
    yield from _selectors(spec.get("affinity", {}), ("spec", "affinity"))
    yield from _selectors(spec.get(spreading[1], []), spreading)


def _toleration(toleration: Mapping[str, Any], path: Path) -> Iterator[Problem]:
    key, operator = toleration.get("key", ""), toleration.get("operator") or "Equal"
    if not key and operator != "Exists":
        yield Problem((*path, "operator"), "must be Exists where no key is given")
    if key and not QUALIFIED.fullmatch(key):
        yield Problem((*path, "key"), f"must be a taint's key, is {shown(key)}")
    if operator == "Exists" and toleration.get("value"):
        yield Problem((*path, "value"), "means nothing with operator Exists")
    if operator == "Equal" and not LABEL_VALUE.fullmatch(toleration.get("value", "")):
        yield Problem((*path, "value"), f"must be a label's value, is {shown(toleration['value'])}")
    if "tolerationSeconds" in toleration and toleration.get("effect") != "NoExecute":
        yield Problem((*path, "effect"), "must be NoExecute where tolerationSeconds is given")


def _labels(labels: Mapping[str, str], path: Path) -> Iterator[Problem]:
    for key, value in labels.items():
        if not QUALIFIED.fullmatch(key):
            yield Problem(
                (*path, key), "no label's key: a name of at most 63 characters, a domain before it or not"
            )
        if not LABEL_VALUE.fullmatch(value):
            yield Problem((*path, key), f"must be a label's value, is {shown(value)}")


def _selectors(value: Any, path: Path) -> Iterator[Problem]:
    """All selectors at and below `value`: node selector terms and label selectors say the same of their parts."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _selectors(item, (*path, index))
    elif isinstance(value, Mapping):
        for name, below in value.items():
            where = (*path, name)
            if name == "nodeSelectorTerms" and not below:
                yield Problem(where, "needs at least one term")
            if name == "matchLabels":
                yield from _labels(below, where)
            elif name in ("matchExpressions", "matchFields"):
                for index, requirement in enumerate(below):
                    yield from _requirement(requirement, (*where, index), name == "matchFields")
            else:
                yield from _selectors(below, where)


def _requirement(requirement: Mapping[str, Any], path: Path, fields: bool) -> Iterator[Problem]:
    operator, values = requirement["operator"], requirement.get("values", [])
    where = (*path, "values")
    if operator in _LISTED and not values:
        yield Problem(where, f"must be there with operator {operator}")
    if operator in _BARE and values:
        yield Problem(where, f"means nothing with operator {operator}")
    if operator in _COMPARED and not (len(values) == 1 and values[0].lstrip("-").isdecimal()):
        yield Problem(where, f"must be one integer with operator {operator}, is {shown(values)}")
    for index, each in enumerate(values):
        if not fields and not LABEL_VALUE.fullmatch(each):
            yield Problem((*where, index), f"must be a label's value, is {shown(each)}")
