"""How workers give way to those of the next revision, and how one leaves."""

from typing import Annotated

from kvasir_operator.api.fields import Part, count, limit


class Rollout(Part, frozen=True):
    """How workers of one revision give way to those of the next. The limits hold for each role."""

    max_surge: Annotated[
        int | str, limit("Workers of a role beyond its replicas: a count, or a percentage of them, rounded up.")
    ] = 1
    max_unavailable: Annotated[
        int | str,
        limit(
            "Workers of a role that may be missing: a count, or a percentage, rounded down. With 0 the paired "
            "capacity of prefill and decode never falls."
        ),
    ] = 0


class Drain(Part, frozen=True):
    """How a worker leaves."""

    deadline_seconds: Annotated[int, count("Longest time to finish what runs before a pod ends.", 0, 86_400)] = 600
