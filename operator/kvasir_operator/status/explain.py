"""PURE: why a service is not ready, in one sentence."""

from collections.abc import Sequence

from kvasir_operator.status.evaluate import CONDITIONS, ConditionState

_PULL = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName")
_CONFIG = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")
_CRASH = ("CrashLoopBackOff", "Restarted", "Error", "OOMKilled")


def explain(conditions: Sequence[ConditionState], ready: ConditionState) -> str:
    """One sentence on why the service is not ready; empty when it is."""
    if ready.true:
        return ""
    roles = {condition: role for role, condition in CONDITIONS.items()}
    for each in sorted((v for v in conditions if not v.true), key=lambda v: not v.trouble):
        what = _sentence(each.reason, each.message)
        return f"{roles[each.type]} has {what}." if each.type in roles else f"{_capital(_about(each))}."
    return f"{_capital(ready.message)}."


def _about(condition: ConditionState) -> str:
    match condition.type:
        case "Accepted":
            return f"the spec is refused: {condition.message}"
        case "ModelCached":
            return f"the model is not in its cache yet: {condition.message}"
        case _:
            return condition.message


def _sentence(reason: str, message: str) -> str:
    """What is wrong with a role's pods; `message` begins with the count."""
    count, _, detail = message.partition("; ")
    detail = detail.replace(f"{reason}: ", "", 1).removesuffix(f": {reason}")
    match reason:
        case "Unschedulable":
            return f"{count}: no node takes {detail}"
        case "WaitingForResourceClaim":
            return f"{count}: {detail}"
        case "ApplyFailed" | "FailedCreate":
            return f"{count}: the API server refuses it: {detail}"
        case "RollingOut":
            return f"{count}; it is being rolled out: {detail}" if detail else f"{count}; it is being rolled out"
        case "Starting":
            return f"{count}; they are starting"
    if reason in _PULL:
        return f"{count}: the image cannot be pulled, {detail}"
    if reason in _CONFIG:
        return f"{count}: something that its container needs is missing, {detail}"
    if reason in _CRASH:
        return f"{count}: its container ended ({reason}), {detail}"
    return f"{count}: {reason}: {detail}" if detail else f"{count}: {reason}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
