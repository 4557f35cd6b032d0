"""The steps of a plan."""

import msgspec

from kvasir_operator.plan.observed import Reference
from kvasir_operator.render.names import Object


class Apply(msgspec.Struct, frozen=True, tag=True):
    """Server-side apply this object, whole. One that carries a resourceVersion is refused when it has changed."""

    object: Object


class Scale(msgspec.Struct, frozen=True, tag=True):
    """Set the replicas of a Deployment or InferenceRole, unless it has changed since `version`."""

    target: Reference
    replicas: int
    version: str = ""


class ReportReplicas(msgspec.Struct, frozen=True, tag=True):
    """Report in an InferenceRole's status how many of its workers are ready."""

    target: Reference
    replicas: int


class Delete(msgspec.Struct, frozen=True, tag=True):
    """Delete an object that is no longer wanted; with a `uid`, only the one that has it."""

    target: Reference
    uid: str = ""


class Wait(msgspec.Struct, frozen=True, tag=True):
    """Nothing can be done until this changes."""

    reason: str


Step = Apply | Scale | ReportReplicas | Delete | Wait
