"""Runs one container: starts it, probes it, restarts it with growing delays, stops it."""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

import httpx

from kvasir_operator.pods import probes
from kvasir_operator.pods.environment import Launch
from kvasir_operator.pods.logs import LogFile
from kvasir_operator.pods.podspec import Container, Exec, HttpGet, Probe, RestartPolicy, Sleep, TcpSocket
from kvasir_operator.pods.process import Process
from kvasir_operator.pods.status import Running, State, Terminated, Waiting, now

_MINIMUM_GRACE = 2.0


@dataclass(frozen=True)
class Backoff:
    """Delays before restarts, in seconds: the first restart is at once, then `base`, doubling up to `cap`.

    A container that ran for twice the cap begins anew. Kubernetes' values are the defaults.
    """

    base: float = 10.0
    cap: float = 300.0

    def delay(self, crashes: int) -> float:
        """The delay in seconds after the `crashes`-th end in a row, counted from 1."""
        return 0.0 if crashes <= 1 else min(self.cap, self.base * 2.0 ** (crashes - 2))


class Pods(Protocol):
    """The part of a pod that its containers call."""

    ip: str
    grace: float
    restart_policy: RestartPolicy
    client: httpx.AsyncClient

    def changed(self) -> None:
        """Note that the container's status has changed."""

    def event(self, kind: str, reason: str, message: str) -> None:
        """Report what a kubelet would post as an Event of the pod."""


class ContainerRunner:
    """Runs one container until it is stopped, or has ended for good. All in one event loop."""

    def __init__(
        self,
        spec: Container,
        launch: Callable[[], Launch],
        command: Callable[[Exec], Launch],
        pod: Pods,
        log: LogFile,
        sink: Callable[[str], None],
        backoff: Backoff,
    ) -> None:
        self.spec = spec
        self.state: State = Waiting("ContainerCreating")
        self.last: Terminated | None = None
        self.restarts = 0
        self.ready = False
        self.started: bool = False
        self._launch = launch
        self._command = command
        self._pod = pod
        self._log = log
        self._sink = sink
        self._backoff = backoff
        self._process: Process | None = None
        self._stopping = asyncio.Event()
        self._killing: asyncio.Task[None] | None = None
        self._probing: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Run the container, and restart it by its policy, until it has ended for good."""
        crashes = 0
        while not self._stopping.is_set():
            begun = asyncio.get_running_loop().time()
            ended = await self._once()
            self.state = ended
            again = self._again(ended.exit_code)
            if not again or self._stopping.is_set():
                self._pod.changed()
                return
            crashes = 1 if asyncio.get_running_loop().time() - begun > 2 * self._backoff.cap else crashes + 1
            delay = self._backoff.delay(crashes)
            self.last = ended
            if delay:
                text = f"back-off {delay:g}s restarting failed container={self.spec.name}"
                self.state = Waiting("CrashLoopBackOff", text)
                self._pod.changed()
                self._pod.event("Warning", "BackOff", text)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(delay):
                        await self._stopping.wait()
            if self._stopping.is_set():
                self.state = ended
                self._pod.changed()
                return
            self.restarts += 1

    async def stop(self, grace: float) -> None:
        """Run the preStop hook, then send SIGTERM; after `grace` seconds for both, SIGKILL. Returns when nothing
        runs."""
        self._stopping.set()
        await self._end(grace)

    def kill(self) -> None:
        """Send SIGKILL now, also during a graceful stop. The container is not restarted."""
        self._stopping.set()
        if self._process is not None:
            self._process.kill()

    def _again(self, code: int) -> bool:
        policy = self._pod.restart_policy
        return policy == "Always" or (policy == "OnFailure" and code != 0)

    async def _once(self) -> Terminated:
        """Run one instance of the container until it ends."""
        begun = now()
        self._log.begin()
        try:
            self._process = process = await Process.start(self._launch(), self._line)
        except OSError as error:
            return self._terminated(128, begun, "StartError", f"cannot start: {error}")
        self.state = Running(begun, process.pid)
        self.started = self.spec.startup is None
        self.ready = self.started and self.spec.readiness is None
        self._pod.changed()
        self._pod.event("Normal", "Started", f"Started container {self.spec.name}")
        if self._stopping.is_set():
            # Asked to stop while it was being started.
            process.kill()
        self._probing = asyncio.ensure_future(self._probe(asyncio.get_running_loop().time()))
        try:
            code = await process.wait()
        except asyncio.CancelledError:
            process.kill()
            await process.wait()
            raise
        finally:
            self._probing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._probing
            self._process = None
            self.ready = self.started = False
        if self._killing is not None:
            await self._killing
            self._killing = None
        return self._terminated(code, begun)

    def _terminated(self, code: int, begun: datetime, reason: str = "", message: str = "") -> Terminated:
        reason = reason or ("Completed" if code == 0 else "Error")
        return Terminated(code, reason, message or (self._log.message() if code else ""), begun, now())

    def _line(self, line: str) -> None:
        self._log.write(line)
        self._sink(line)

    async def _probe(self, started: float) -> None:
        """Run the startup probe, then readiness and liveness until the instance ends. Each may end it by a
        failure."""
        spec = self.spec
        if spec.startup is not None:
            passed = asyncio.Event()

            def startup(ok: bool, why: str) -> None:
                if ok:
                    passed.set()
                else:
                    self._unhealthy("Startup", spec.startup, why)

            watching = asyncio.ensure_future(self._watch(spec.startup, startup, started))
            try:
                await passed.wait()
            finally:
                watching.cancel()
            self.started = True
            self.ready = spec.readiness is None
            self._pod.changed()
        async with asyncio.TaskGroup() as group:
            if spec.readiness is not None:
                group.create_task(self._watch(spec.readiness, self._readiness, started, at_once=True))
            if spec.liveness is not None:
                group.create_task(self._watch(spec.liveness, self._liveness, started, at_once=True))

    def _watch(
        self, probe: Probe, report: Callable[[bool, str], None], started: float, at_once: bool = False
    ) -> Coroutine[None, None, None]:
        return probes.watch(probe, lambda: self._perform(probe.action), report, started, at_once)

    def _readiness(self, ok: bool, why: str) -> None:
        if not ok:
            self._pod.event("Warning", "Unhealthy", f"Readiness probe failed: {why}")
        if ok != self.ready:
            self.ready = ok
            self._pod.changed()

    def _liveness(self, ok: bool, why: str) -> None:
        if not ok:
            self._unhealthy("Liveness", self.spec.liveness, why)

    def _unhealthy(self, kind: str, probe: Probe | None, why: str) -> None:
        """End this instance, whose startup or liveness probe failed; `run` decides about a restart."""
        if self._killing is not None or self._stopping.is_set():
            return
        self._pod.event("Warning", "Unhealthy", f"{kind} probe failed: {why}")
        text = f"Container {self.spec.name} failed {kind.lower()} probe, will be restarted"
        self._pod.event("Normal", "Killing", text)
        self._line(f"kvasir: error: {kind.lower()} probe failed: {why}")
        grace = probe.grace if probe is not None and probe.grace is not None else self._pod.grace
        self._killing = asyncio.ensure_future(self._end(grace))

    async def _perform(self, action: HttpGet | TcpSocket | Exec | Sleep) -> str | None:
        return await probes.perform(action, self._pod.ip, self._pod.client, self._command)

    async def _end(self, grace: float) -> None:
        process = self._process
        if process is None:
            return
        loop = asyncio.get_running_loop()
        deadline = loop.time() + grace
        if self.spec.pre_stop is not None and grace > 0:
            await self._pre_stop(process, grace)
        if grace > 0:
            process.terminate()
            left = max(deadline - loop.time(), min(grace, _MINIMUM_GRACE))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await process.wait()
                    return
        process.kill()
        await process.wait()

    async def _pre_stop(self, process: Process, grace: float) -> None:
        assert self.spec.pre_stop is not None
        hook = asyncio.ensure_future(self._perform(self.spec.pre_stop))
        ended = asyncio.ensure_future(process.wait())
        try:
            await asyncio.wait({hook, ended}, timeout=grace, return_when=asyncio.FIRST_COMPLETED)
            if hook.done() and (failure := hook.result()) is not None:
                self._pod.event("Warning", "FailedPreStopHook", failure)
            elif not hook.done() and not ended.done():
                self._pod.event("Warning", "FailedPreStopHook", f"still running after {grace:g}s")
        finally:
            hook.cancel()
            ended.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await hook
