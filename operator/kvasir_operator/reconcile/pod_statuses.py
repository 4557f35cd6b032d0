"""What the pods of a service report of themselves, for its status. A pod that does not answer is no error."""

from collections.abc import Sequence
from typing import Protocol

from kvasir_engine.status_reports import RouterStatus, WorkerStatus
from kvasir_operator.api import WORKER_ROLES
from kvasir_operator.plan.observed import Observed
from kvasir_operator.plan.preload import PRELOAD, Progress
from kvasir_operator.status.evaluate import LeavingPod
from kvasir_operator.status.links import MeasuredLink

MOST_LOADING = 2  # pods of a Job that are asked, one after the other
MOST_LINKED = 64  # prefill workers that are asked for their links


class PodStatusReader(Protocol):
    """Asks pods by their addresses. The answer of a pod that does not answer is `None`."""

    def progress(self, ip: str) -> Progress | None:
        """The progress of the Job's pod."""
        ...

    def routers(self, ips: Sequence[str]) -> list[RouterStatus | None]:
        """The status of each router."""
        ...

    def workers(self, ips: Sequence[str]) -> list[WorkerStatus | None]:
        """The status of each worker."""
        ...


class PodStatuses:
    """The reports of a service's pods. Without a `reader` no pod is asked."""

    def __init__(self, reader: PodStatusReader | None) -> None:
        self._reader = reader

    def progress(self, observed: Observed) -> Progress | None:
        """The progress of the running pod of the model's Job."""
        if self._reader is None:
            return None
        running = [pod.ip for pod in observed.pods if pod.role == PRELOAD and pod.ip]
        return next(filter(None, map(self._reader.progress, running[:MOST_LOADING])), None)

    def routers(self, observed: Observed) -> list[RouterStatus | None] | None:
        """The status of each ready router, `None` for one that does not answer; `None` where no pod is asked."""
        if self._reader is None:
            return None
        return self._reader.routers(
            [pod.ip for pod in observed.pods if pod.role == "router" and pod.ready and pod.ip]
        )

    def links(self, observed: Observed) -> list[MeasuredLink] | None:
        """The links that ready prefill workers measured; `None` where none of them answers."""
        pods = [pod for pod in observed.pods if pod.role == "prefill" and pod.ready and pod.ip and not pod.follower]
        if self._reader is None or not pods:
            return []
        some = sorted(pods, key=lambda pod: pod.name)[:MOST_LINKED]
        reports = self._reader.workers([pod.ip for pod in some])
        if not any(reports):
            return None
        found = zip(some, reports, strict=True)
        return [MeasuredLink(pod.name, link) for pod, status in found if status for link in status.links]

    def leaving(self, observed: Observed) -> list[LeavingPod]:
        """The workers that are being deleted, with the requests and leases that they still have. The leader answers
        for its group."""
        workers = [pod for pod in observed.leaving if pod.role in WORKER_ROLES]
        leaders = {pod.group for pod in workers if not pod.follower}
        left = {pod.group: pod for pod in reversed(workers) if pod.follower and pod.group not in leaders}
        pods = [pod for pod in workers if not pod.follower or left.get(pod.group) is pod]
        reports = self._reader.workers([pod.ip for pod in pods]) if self._reader else [None] * len(pods)
        return [
            LeavingPod(pod.name, status.requests, status.leases) if status else LeavingPod(pod.name)
            for pod, status in zip(pods, reports, strict=True)
        ]
