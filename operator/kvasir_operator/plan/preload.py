"""PURE: the state of the Job that loads the model into its shared cache."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from kvasir_operator.plan.observed import Observed, reference
from kvasir_operator.render.names import Object

PRELOAD = "preload"
_UNITS = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


class Progress(msgspec.Struct, frozen=True):
    """What the Job's pod reports: bytes or files done, `total` 0 while unknown, `stage` empty before the first."""

    stage: str
    done: int
    total: int

    def __str__(self) -> str:
        if self.total <= 0:
            return self.stage
        if self.stage != "download" or self.total < _UNITS[-1][0]:
            return f"{self.stage} {self.done} of {self.total}"
        size, unit = next(each for each in _UNITS if self.total >= each[0])
        share = 100 * min(self.done, self.total) // self.total
        return f"{self.stage} {share}% of {self.total / size:.1f} {unit}"


class Loading(msgspec.Struct, frozen=True):
    """The state of the Job: `reason` and `message` are those of the condition ModelCached."""

    done: bool
    reason: str
    message: str


def loading(desired: Sequence[Object], observed: Observed, progress: Progress | None = None) -> Loading | None:
    """The state of the model's Job; `None` where there is none."""
    job = next((item for item in desired if item["kind"] == "Job"), None)
    if job is None:
        return None
    name = job["metadata"]["name"]
    live = observed.objects.get(reference(job))
    if live is None:
        return Loading(False, "Loading", f"Job {name} is being created")
    conditions = {c["type"]: c for c in _conditions(live) if c["status"] == "True"}
    if "Complete" in conditions:
        return Loading(True, "Cached", "the model is in the cache")
    if failed := conditions.get("Failed"):
        why = failed.get("message") or failed.get("reason", "")
        return Loading(False, "Failed", f"{why}; after mending it, delete Job {name} to try again")
    troubles = sorted(p.trouble for p in observed.pods if p.role == PRELOAD and p.trouble)
    if troubles:
        return Loading(False, troubles[0].reason, f"pod {troubles[0].pod}: {troubles[0].message}")
    return Loading(False, "Loading", str(progress) if progress and progress.stage else f"Job {name} loads it")


def _conditions(item: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = item.get("status", {}).get("conditions", [])
    return found


def held(desired: Sequence[Object], observed: Observed, begins: bool) -> str:
    """Why new workers are not created yet: their GPUs would wait for the download. Empty when they may be.

    `begins`: workers are wanted of a revision that has none yet. One that has some found its model before.
    """
    state = loading(desired, observed)
    return f"the model is not in the cache: {state.message}" if begins and state and not state.done else ""
