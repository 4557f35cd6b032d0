"""Who places the pods of a worker, together or not at all."""

from typing import Annotated, Literal

from kvasir_operator.api.fields import OBJECT_NAME, Part, about, text


class Gang(Part, frozen=True):
    """What places the pods of a worker over several nodes all at once. It is not Kvasir's to install."""

    provider: Annotated[
        Literal["Kueue", "KAI", "Volcano"],
        about(
            "Kueue admits a group when its quota has room for it. KAI and Volcano are schedulers of their own; "
            "Volcano's PodGroups are made by LeaderWorkerSet, which has to be set up so."
        ),
    ]
    queue: Annotated[
        str,
        text("Kueue: a LocalQueue of the namespace. Others: a Queue of the cluster.", OBJECT_NAME, 63),
    ]


class Scheduling(Part, frozen=True):
    """How pods are placed, beyond what nodes they prefer."""

    gang: Annotated[
        Gang | None,
        about("For roles with nodes above 1: all pods of a worker are placed, or none. Default: one by one."),
    ] = None
