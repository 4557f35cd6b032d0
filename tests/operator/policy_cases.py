"""Templates and what a policy says of them, for the tests of what the installer lets pods be."""

from typing import Any

from isvc_cases import document

from kvasir_operator.admission import parse
from kvasir_operator.api import InvalidService
from kvasir_operator.pod_validation import PodPolicy
from kvasir_operator.render import Object


def refused(spec: Object, policy: PodPolicy) -> dict[str, str]:
    """The fields that are refused, and why."""
    try:
        parse(document(**spec), policy=policy)
    except InvalidService as error:
        return {each.path: each.reason for each in error.problems}
    return {}


def templated(pod: Object, role: str = "decode", **metadata: Any) -> Object:
    return {role: {"template": {**({"metadata": metadata} if metadata else {}), "spec": pod}}}
