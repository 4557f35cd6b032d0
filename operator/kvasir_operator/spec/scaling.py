"""Who says how many workers there are."""

from typing import Annotated, Literal

from kvasir_operator.spec.fields import Part, about


class Scaling(Part, frozen=True):
    """Who says how many workers there are."""

    mode: Annotated[
        Literal["Fixed", "External"],
        about(
            "Fixed: each role's replicas. External: the replicas of the InferenceRoles NAME-prefill and "
            "NAME-decode, which begin with each role's replicas and have the scale subresource for kubectl scale, "
            "a HorizontalPodAutoscaler or KEDA."
        ),
    ] = "Fixed"
