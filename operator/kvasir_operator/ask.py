"""What pods say of themselves over HTTP: an edge. A pod that does not answer is nobody's error."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import httpx
import msgspec

from kvasir_engine.reports import RouterStatus, WorkerStatus
from kvasir_operator.plan.preload import Progress
from kvasir_operator.render.pod import PORT

TIMEOUT_SECONDS = 2.0
# Pods that are asked at once, and the time after which those that have not answered are not waited for.
PARALLEL = 32
ALL_SECONDS = 4.0

T = TypeVar("T")


class PodReader:
    """Asks pods by their addresses. Blocking, for use in threads."""

    def __init__(self, client: httpx.Client | None = None) -> None:
        # No proxy of the environment: pods are in the cluster.
        self._client = client or httpx.Client(timeout=TIMEOUT_SECONDS, trust_env=False)

    def progress(self, ip: str) -> Progress | None:
        """How far the Job's pod at `ip` is, or `None`."""
        return self._ask(ip, "/progress", Progress)

    def routers(self, ips: Sequence[str]) -> list[RouterStatus | None]:
        """What the routers at these addresses say, or `None`."""
        return self._ask_all(ips, RouterStatus)

    def workers(self, ips: Sequence[str]) -> list[WorkerStatus | None]:
        """What the workers at these addresses say, or `None`."""
        return self._ask_all(ips, WorkerStatus)

    def _ask_all(self, ips: Sequence[str], kind: type[T]) -> list[T | None]:
        if len(ips) < 2:
            return [self._ask(ip, "/status", kind) for ip in ips]
        pool = ThreadPoolExecutor(min(len(ips), PARALLEL))
        try:
            asked: list[Future[T | None]] = [pool.submit(self._ask, ip, "/status", kind) for ip in ips]
            done, _ = wait(asked, ALL_SECONDS)
            return [each.result() if each in done else None for each in asked]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, ip: str, path: str, kind: type[T]) -> T | None:
        host = f"[{ip}]" if ":" in ip else ip
        try:
            answer = self._client.get(f"http://{host}:{PORT}{path}")
            answer.raise_for_status()
            return msgspec.json.decode(answer.content, type=kind)
        except (httpx.HTTPError, msgspec.DecodeError):
            return None
