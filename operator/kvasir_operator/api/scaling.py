"""Who says how many workers there are."""

from typing import Annotated, Literal

from kvasir_operator.api.fields import Part, about, count


class RoleBounds(Part, frozen=True):
    """Between how many workers a role is scaled."""

    max_replicas: Annotated[
        int, count("Most workers of the role. 0, of prefill only: decode does it all.", 0, 10_000)
    ]
    min_replicas: Annotated[
        int, count("Fewest workers of the role while there are any. To have none, see scaleToZero.", 0, 10_000)
    ] = 1


class ScaleToZero(Part, frozen=True):
    """Both roles go to zero together, and come back together for requests that routers hold meanwhile."""

    idle_seconds: Annotated[
        int,
        count("After how long without a request both roles go to zero; no less than the window.", 1, 604_800),
    ] = 600
    hold_seconds: Annotated[
        int,
        count("How long a router keeps a request for which no worker runs. Then: 503 with Retry-After.", 1, 86_400),
    ] = 600
    hold_requests: Annotated[
        int, count("Most requests that a router keeps so. More: 503 with Retry-After.", 1, 1_000_000)
    ] = 1000


class AutoScaling(Part, frozen=True):
    """What the operator's planner holds, and within which bounds."""

    prefill: Annotated[RoleBounds, about("Bounds of prefill, which moves on what arrives and on TTFT.")]
    decode: Annotated[RoleBounds, about("Bounds of decode, which moves on ITL and on KV memory.")]
    ttft_milliseconds: Annotated[
        int, count("Mean time to first token that is to be held, once a pair has started.", 1, 3_600_000)
    ] = 2000
    itl_milliseconds: Annotated[int, count("Mean inter-token latency that is to be held.", 1, 60_000)] = 50
    max_gpus: Annotated[
        int, count("Most GPUs of both roles' workers together, rollouts apart. 0: as the bounds allow.", 0, 100_000)
    ] = 0
    stabilization_window_seconds: Annotated[
        int, count("No role goes down within so long of having needed more.", 1, 86_400)
    ] = 300
    scale_to_zero: Annotated[
        ScaleToZero | None, about("Present: no workers run while nobody asks. Default: minReplicas stay.")
    ] = None


class Scaling(Part, frozen=True):
    """Who says how many workers there are."""

    mode: Annotated[
        Literal["Fixed", "External", "Auto", "Shadow"],
        about(
            "Fixed: each role's replicas. External: the replicas of the InferenceRoles NAME-prefill and "
            "NAME-decode, which begin with each role's replicas and have the scale subresource for kubectl scale, "
            "a HorizontalPodAutoscaler or KEDA. Auto: the operator scales both roles, beginning with each role's "
            "replicas, as auto says. Shadow: as Fixed, and status and metrics say what Auto would do."
        ),
    ] = "Fixed"
    auto: Annotated[AutoScaling | None, about("What Auto and Shadow go by; with them it is required.")] = None

    @property
    def holds(self) -> ScaleToZero | None:
        """How routers hold requests without a worker, if they do."""
        return self.auto.scale_to_zero if self.auto and self.mode == "Auto" else None
