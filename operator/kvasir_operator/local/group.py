"""Groups of pods that start and stop together: a worker over several nodes. Any other pod is a group of one.

As with LeaderWorkerSet's RecreateGroupOnPodRestart: when one pod of a group ends, all are stopped and recreated.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterable

from kvasir_operator.local.running import RunningPod
from kvasir_operator.pods import Backoff, PodError


class PodGroup:
    """The pods of one group. Their containers are not restarted one by one (restartPolicy Never).

    A group of one restarts its containers (restartPolicy Always), and ends only by `stop`. `changed` is called when
    a pod's state has changed and its runner does not report it. For one event loop.
    """

    def __init__(self, pods: Iterable[RunningPod], backoff: Backoff, changed: Callable[[], None]) -> None:
        self.pods = tuple(pods)
        self.role = self.pods[0].planned.role
        self.name = self.pods[0].planned.group or self.pods[0].planned.name
        self._backoff = backoff
        self._changed = changed
        self._keeping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start all pods, and keep the group running. Raises PodError."""
        for pod in self.pods:
            await pod.runner.start()
        self._keeping = asyncio.ensure_future(self._keep())

    async def stop(self) -> None:
        """Stop all pods at the same time, gracefully, and for good."""
        if self._keeping is not None:
            self._keeping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeping
        async with asyncio.TaskGroup() as group:
            for pod in self.pods:
                group.create_task(pod.runner.stop())

    async def _keep(self) -> None:
        loop = asyncio.get_running_loop()
        crashes = 0
        while True:
            begun = loop.time()
            culprit = await self._first_to_end()
            failure = culprit.runner.failure
            status = f" with exit status {failure.exit_code}" if failure is not None else ""
            for pod in self.pods:
                pod.hold(f"{culprit.planned.name} ended{status}", failure if pod is culprit else None)
            crashes = 1 if loop.time() - begun > 2 * self._backoff.cap else crashes + 1
            while not await self._again(crashes):
                crashes += 1

    async def _again(self, crashes: int) -> bool:
        """Recreate all pods when they have stopped. False if one cannot start."""
        self._changed()
        async with asyncio.TaskGroup() as group:
            for pod in self.pods:
                group.create_task(pod.runner.stop())
        await asyncio.sleep(self._backoff.delay(crashes))
        for pod in self.pods:
            pod.renew()
        try:
            for pod in self.pods:
                await pod.runner.start()
        except PodError as error:
            for pod in self.pods:
                pod.hold(str(error))
            return False
        return True

    async def _first_to_end(self) -> RunningPod:
        ends = {asyncio.ensure_future(pod.runner.wait()): pod for pod in self.pods}
        try:
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for waiting in ends:
                waiting.cancel()
        return min((ends[each] for each in done), key=_when)


def _when(pod: RunningPod) -> float:
    failure = pod.runner.failure
    return failure.finished_at.timestamp() if failure is not None else 0.0
