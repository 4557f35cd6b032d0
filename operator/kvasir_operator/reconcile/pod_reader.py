"""Reads the status of pods over HTTP. A pod that does not answer is no error.

A pod may run anything: it may answer without end, with any number of bytes, or with a redirect.
"""

from collections.abc import Sequence
from typing import TypeVar

import httpx
import msgspec

from kvasir_engine.status_reports import RouterStatus, WorkerStatus
from kvasir_operator.plan.preload import Progress
from kvasir_operator.reconcile.bounded_http import BoundedHttp, Unanswered
from kvasir_operator.render.pod import PORT

TIMEOUT_SECONDS = 2.0
# The time after which pods that have not answered are not waited for.
ALL_SECONDS = 4.0
MOST_BYTES = 2 * 2**20  # pairs of hundreds of workers

T = TypeVar("T")


class PodReader:
    """Asks pods by their addresses. Blocking, for use in threads."""

    def __init__(self, transport: httpx.AsyncBaseTransport | None = None) -> None:
        # No proxy of the environment: pods are in the cluster.
        self._bounded = BoundedHttp(MOST_BYTES, TIMEOUT_SECONDS, transport=transport)

    def progress(self, ip: str) -> Progress | None:
        """The progress of the Job's pod at `ip`, or `None`."""
        return self._ask_all([ip], "/progress", Progress)[0]

    def routers(self, ips: Sequence[str]) -> list[RouterStatus | None]:
        """The status of each router at these addresses, or `None`."""
        return self._ask_all(ips, "/status", RouterStatus)

    def workers(self, ips: Sequence[str]) -> list[WorkerStatus | None]:
        """The status of each worker at these addresses, or `None`."""
        return self._ask_all(ips, "/status", WorkerStatus)

    def _ask_all(self, ips: Sequence[str], path: str, kind: type[T]) -> list[T | None]:
        hosts = [f"[{ip}]" if ":" in ip else ip for ip in ips]
        answers = self._bounded.get_all([f"http://{host}:{PORT}{path}" for host in hosts], ALL_SECONDS)
        return [_decoded(each, kind) for each in answers]


def _decoded(answer: bytes | Unanswered, kind: type[T]) -> T | None:
    if isinstance(answer, Unanswered):
        return None
    try:
        return msgspec.json.decode(answer, type=kind)
    except (ValueError, RecursionError):
        return None
