"""A pod of a run: its runner, and the state that outlives a runner."""

import json
from collections.abc import Callable

from kvasir_operator.local.pods import LocalPod
from kvasir_operator.local.state import LocalPodState
from kvasir_operator.pods import PodRunner, Terminated


class RunningPod:
    """A pod with its runner. Each time the pod is recreated, `make` gives a new runner. Raises PodError."""

    def __init__(self, planned: LocalPod, make: "Callable[[RunningPod], PodRunner]") -> None:
        self.planned = planned
        self.was_ready = False
        self.warning = ""
        #: Why it is down until its group is up again; empty: it is not.
        self.held = ""
        self._make = make
        self._renewed = 0
        self._failed: Terminated | None = None
        self.runner = make(self)

    def hold(self, why: str, failure: Terminated | None = None) -> None:
        """Mark the pod as stopped until `renew`. `failure`: its own end, if that is why its group stopped."""
        self.held, self._failed = why, failure

    def renew(self) -> None:
        """Recreate the pod after the runner's end."""
        self._renewed += 1
        self.held = self.warning = ""
        self.runner = self._make(self)

    @property
    def ready(self) -> bool:
        """Whether the pod is Ready."""
        return self.runner.ready

    @property
    def restarts(self) -> int:
        """How often it was restarted, alone or with its group."""
        return self._renewed + self.runner.restarts

    @property
    def failure(self) -> Terminated | None:
        """Its last own end, if it has not been ready since."""
        if self.runner.ready:
            return None
        return self._failed if self.runner.stopping else self.runner.failure or self._failed

    def view(self) -> LocalPodState:
        """The pod's present state."""
        word, message = self._word()
        return LocalPodState(
            name=self.planned.name,
            role=self.planned.role,
            address=str(self.planned.address),
            url=f"http://{self.planned.address}",
            log=str(self.runner.log_path()),
            pid=self.runner.pid,
            ready=self.runner.ready,
            restarts=self.restarts,
            state=word,
            message=message,
            group=self.planned.group,
        )

    def _word(self) -> tuple[str, str]:
        if self.held:
            return "crashed", self.held
        if self.runner.ready and not self.runner.stopping:
            return "ready", ""
        failure = self.runner.failure or self._failed
        ended = f"exit {failure.exit_code}: {failure.message}".strip(": ") if failure is not None else ""
        containers = self.runner.status()["containerStatuses"]
        states = [next(iter(c["state"])) for c in containers]
        if not states:
            return "pending", ""
        if all(s == "terminated" for s in states):
            return "ended", "" if self.runner.stopping and failure is not None and not failure.exit_code else ended
        if self.runner.stopping:
            return "stopping", ""
        if "waiting" in states or "terminated" in states:
            reason = next((c["state"]["waiting"]["reason"] for c in containers if "waiting" in c["state"]), "Error")
            return ("pending", "") if reason == "ContainerCreating" else ("crashed", ended)
        if not all(c["started"] for c in containers):
            return "loading", ended
        # Before the first answer of its readiness probe a pod is still on its way.
        return ("not ready", _reason(self.warning)) if self.was_ready or self.warning else ("loading", ended)


def _reason(warning: str) -> str:
    """The `reason` of a Kvasir pod's /ready in a failed probe's message; else the message itself."""
    try:
        return str(json.loads(warning[warning.index("{") :])["reason"])
    except (ValueError, KeyError, TypeError):
        return warning
