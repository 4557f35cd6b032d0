"""Runs one pod as supervised processes: the part of a kubelet that starts, probes, restarts and stops
containers."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvasir_operator.pods import environment, podspec, probes, status, volumes
from kvasir_operator.pods.container import Backoff, ContainerRunner
from kvasir_operator.pods.environment import Launch
from kvasir_operator.pods.host import Host
from kvasir_operator.pods.logs import LogFile
from kvasir_operator.pods.podspec import Container, Exec, PodError


class PodRunner:
    """Runs the containers of one pod on this machine.

    `pod` is the Kubernetes object (metadata and spec). `ip` is the address that its probes and status use; the
    programs get it by the downward API, and have to bind it themselves. `state` is a directory for this pod alone:
    it holds emptyDirs, and the logs `state/CONTAINER.log`. `exec_prefix` goes before every command (containers,
    exec probes, exec hooks). The callbacks run in the event loop and must not block: `on_change(self)` after each
    change of `status()`, `on_line(container, line)` for each line of output, `on_event(type, reason, message)` for
    what a kubelet would post as an Event.

    All methods have to be called in the event loop that called `start`. The constructor raises PodError for a spec
    that cannot run, `start` for volumes and references that cannot be resolved. Then nothing is left running or
    open, and a new runner may try again later.
    """

    def __init__(
        self,
        pod: Mapping[str, Any],
        ip: str,
        state: Path,
        host: Host,
        *,
        exec_prefix: Sequence[str] = (),
        backoff: Backoff | None = None,
        on_change: "Callable[[PodRunner], None] | None" = None,
        on_line: Callable[[str, str], None] | None = None,
        on_event: Callable[[str, str, str], None] | None = None,
    ) -> None:
        self.pod = podspec.parse(pod)
        self.name = self.pod.name
        self.ip = ip
        self.restart_policy = self.pod.restart_policy
        self.grace = self.pod.grace
        self.client = probes.http_client()
        self._state = state
        self._host = host
        self._prefix = tuple(exec_prefix)
        self._backoff = backoff or Backoff()
        self._on_change = on_change
        self._on_line = on_line
        self._on_event = on_event
        self._started = status.now()
        self._conditions: dict[str, status.PodCondition] = {}
        self._containers: list[ContainerRunner] = []
        self._logs: list[LogFile] = []
        self._run: asyncio.Task[None] | None = None
        self._stop: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Create volumes, resolve references and start the containers. Does not wait for readiness."""
        self._state.mkdir(parents=True, exist_ok=True)
        try:
            paths = volumes.materialise(self.pod, self._host, self._state)
            self._containers = [self._container(c, paths) for c in self.pod.containers]
        except PodError:
            await self._close()
            raise
        self._started = status.now()
        self.changed()
        self._run = asyncio.ensure_future(self._supervise())

    async def wait(self) -> None:
        """Wait until all containers have ended for good."""
        assert self._run is not None, "not started"
        await asyncio.shield(self._run)

    async def stop(self, grace: float | None = None) -> None:
        """Stop all containers at the same time: preStop hook, SIGTERM, `grace` seconds (default: the pod's),
        SIGKILL.

        Returns when all processes are gone. A second call waits for the same stop; `kill` ends it at once.
        """
        if self._run is None:
            await self._close()
            return
        if self._stop is None:
            self._stop = asyncio.ensure_future(self._stop_all(self.grace if grace is None else grace))
        await asyncio.shield(self._stop)

    def kill(self) -> None:
        """Send SIGKILL to all processes now, also during a graceful stop. `stop` and `wait` return when they are
        gone."""
        for container in self._containers:
            container.kill()

    @property
    def stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stop is not None

    @property
    def ready(self) -> bool:
        """Whether the pod is Ready: every container passes its readiness probe."""
        return bool(self._containers) and all(c.ready for c in self._containers)

    @property
    def restarts(self) -> int:
        """The restarts of all containers together."""
        return sum(c.restarts for c in self._containers)

    @property
    def pid(self) -> int | None:
        """The process id of the first running container's command."""
        for container in self._containers:
            if isinstance(container.state, status.Running):
                return container.state.pid
        return None

    @property
    def failure(self) -> status.Terminated | None:
        """The last end of a container that does not run now, or runs again and is not ready yet."""
        for container in self._containers:
            if isinstance(container.state, status.Terminated):
                return container.state
            if container.last is not None and not container.ready:
                return container.last
        return None

    def status(self) -> dict[str, Any]:
        """The pod's present `.status` in the form of Kubernetes' API."""
        return status.build(
            self.pod, self._containers, self._conditions, self.ip, self._host.host_ip, self._started
        )

    def log_path(self, container: str | None = None) -> Path:
        """The log file of a container, by default of the first one."""
        return self._state / f"{container or self.pod.containers[0].name}.log"

    def changed(self) -> None:
        """A container calls this when its status has changed."""
        self._conditions = status.conditions(self._containers, self._conditions, status.now())
        if self._on_change is not None:
            self._on_change(self)

    def event(self, kind: str, reason: str, message: str) -> None:
        """A container calls this to report an Event of the pod."""
        if self._on_event is not None:
            self._on_event(kind, reason, message)

    def _container(self, spec: Container, paths: Mapping[str, Path]) -> ContainerRunner:
        mounts = volumes.mounts(spec, self.pod, paths)
        launch = environment.resolve(spec, self.pod, self.ip, self._host, mounts, self._prefix)

        def command(action: Exec) -> Launch:
            argv = self._host.command(spec.image, [mounts.rewrite(part) for part in action.command])
            return Launch((*self._prefix, *argv), launch.env, launch.cwd)

        def sink(line: str) -> None:
            if self._on_line is not None:
                self._on_line(spec.name, line)

        log = LogFile(self.log_path(spec.name))
        self._logs.append(log)
        return ContainerRunner(spec, lambda: launch, command, self, log, sink, self._backoff)

    async def _supervise(self) -> None:
        async with asyncio.TaskGroup() as group:
            for container in self._containers:
                group.create_task(container.run())

    async def _stop_all(self, grace: float) -> None:
        async with asyncio.TaskGroup() as group:
            for container in self._containers:
                group.create_task(container.stop(grace))
        assert self._run is not None
        await self._run
        await self._close()

    async def _close(self) -> None:
        await self.client.aclose()
        for log in self._logs:
            log.close()
