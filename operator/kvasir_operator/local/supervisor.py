"""One local run: check the manifest, reserve addresses, fetch the model, run the pods, stop them at the end."""

import asyncio
import contextlib
import itertools
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from kvasir_engine.model.loading.uri import ClaimURI
from kvasir_engine.model.loading.uri import parse as parse_uri
from kvasir_operator.api import Model
from kvasir_operator.api.validation import ModelMetadata, model_problems
from kvasir_operator.local import addresses, events, fetch, machine, manifest, pods, state
from kvasir_operator.local.addresses import PodAddress
from kvasir_operator.local.certificates import pod_certificates
from kvasir_operator.local.config import RunConfig, cache_folder
from kvasir_operator.local.errors import LocalError
from kvasir_operator.local.group import PodGroup
from kvasir_operator.local.pods import LocalPod
from kvasir_operator.local.proxy import Proxy
from kvasir_operator.local.running import RunningPod
from kvasir_operator.local.state import LocalPodState, RunState
from kvasir_operator.pods import Backoff, Host, Image, PodError, PodRunner, host_environment
from kvasir_operator.render.pod import PORT
from kvasir_operator.render.storage import CACHE_VOLUMES

# Restarts after which a pod that was never ready fails the run, and exit statuses that fail it at once: a user
# error (2), no program (126 to 128).
_RESTARTS = 3
_HOPELESS = (2, 126, 127, 128)
_BACKOFF = Backoff(base=1.0, cap=30.0)


class LocalSupervisor:
    """Runs `config`, and passes events to `report`. One per process."""

    def __init__(self, config: RunConfig, report: events.Report) -> None:
        self._config = config
        self._report = report
        self._stop = asyncio.Event()
        self._changed = asyncio.Event()
        self._pods: list[RunningPod] = []
        self._groups: list[PodGroup] = []
        self._views: dict[str, LocalPodState] = {}
        self._directory: state.Directory | None = None
        self._state: RunState | None = None
        self._metadata: ModelMetadata | None = None
        self._proxy: Proxy | None = None

    async def run(self) -> int:
        """Run until stopped or failed; returns the exit status: 0 if stopped, else `Failed` has been reported."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self.stop)
        failure: LocalError | None = None
        async with contextlib.AsyncExitStack() as stack:
            try:
                await self._until_stopped(stack)
            except LocalError as error:
                failure = error
        if failure is not None:
            self._report(events.Failed(str(failure), failure.status))
            return failure.status
        return 0

    def stop(self) -> None:
        """Stop the pods gracefully; a second call kills them."""
        if self._stop.is_set():
            for pod in self._pods:
                pod.runner.kill()
        self._stop.set()
        self._changed.set()

    async def _until_stopped(self, stack: contextlib.AsyncExitStack) -> None:
        config, begun = self._config, time.monotonic()
        read = manifest.load(config.manifest, config.source)
        service = read.service
        here = machine.detect(config.claims)
        notes = machine.check(read, here)
        name = config.name or service.name
        self._directory = directory = state.Directory(name)
        stack.callback(directory.close)
        sock = addresses.bind_endpoint(config.port)
        stack.callback(sock.close)
        url = f"http://{addresses.LOOPBACK}:{sock.getsockname()[1]}"
        reserved = addresses.reserve(pods.count(service), PORT)
        stack.callback(reserved.close)
        pid = os.getpid()
        self._state = RunState(name, url, False, pid, state.start_time(pid), service.served_name)
        directory.write(self._state)
        for note in notes:
            self._report(events.Note(note))

        planned = pods.pods(service, reserved.addresses, here)
        host = self._host(here, {**read.secrets, **pod_certificates(service)})
        self._proxy = proxy = Proxy(sock, self._routers)
        # Unwound from the end: connections are cut only once the pods have finished what they had.
        stack.callback(proxy.close)
        stack.push_async_callback(self._stop_pods)
        self._pods = [self._add(pod, host, directory) for pod in planned]
        groups = itertools.groupby(self._pods, lambda pod: pod.planned.group or pod.planned.name)
        self._groups = [PodGroup(pods, _BACKOFF, self._changes) for _, pods in groups]
        self._changes()

        await self._fetch(service.spec.model, here)
        if self._stop.is_set():
            return
        if problems := model_problems(service, self._metadata):
            raise LocalError(f"{config.source}: {'; '.join(map(str, problems))}")
        await proxy.start()
        for group in self._groups:
            try:
                await group.start()
            except PodError as error:
                raise LocalError(f"{group.name}: {error}") from None
        if await self._ready():
            auth = bool(service.spec.router.auth.secret_name)
            self._report(events.Ready(name, service.served_name, url, time.monotonic() - begun, auth))
        await self._stop.wait()
        self._report(events.Stopping())

    def _host(self, here: machine.Machine, secrets: dict[str, dict[str, bytes]]) -> Host:
        command = self._config.engine.command
        cache = cache_folder()
        cache.mkdir(parents=True, exist_ok=True)
        return Host(
            images={pods.ENGINE_IMAGE: Image(command, programs={"kvasir": command})},
            volumes=dict.fromkeys(CACHE_VOLUMES, cache),
            claims={claim: Path(path) for claim, path in here.claims.items()},
            secrets=secrets,
            node_name="localhost",
        )

    def _add(self, planned: LocalPod, host: Host, directory: state.Directory) -> RunningPod:
        def line(container: str, text: str) -> None:
            self._report(events.Line(planned.name, text))

        def make(pod: RunningPod) -> PodRunner:
            def event(kind: str, reason: str, message: str) -> None:
                if kind == "Warning":
                    pod.warning = message
                    self._changes()

            return PodRunner(
                planned.pod,
                planned.address.ip,
                directory.pod(planned.name),
                host,
                backoff=_BACKOFF,
                on_change=lambda _: self._changes(),
                on_line=line,
                on_event=event,
            )

        try:
            return RunningPod(planned, make)
        except PodError as error:
            raise LocalError(f"{planned.name}: {error}") from None

    def _changes(self) -> None:
        """Report changes of pods, and write them to the state on disk."""
        assert self._state is not None
        assert self._directory is not None
        for pod in self._pods:
            if pod.runner.ready:
                pod.was_ready, pod.warning = True, ""
            view = pod.view()
            if view != self._views.get(view.name):
                self._views[view.name] = view
                self._report(events.PodChanged(view))
        ready = bool(self._pods) and all(pod.runner.ready for pod in self._pods) and not self._stop.is_set()
        now = RunState(
            self._state.name,
            self._state.url,
            ready,
            self._state.supervisor,
            self._state.started,
            self._state.model,
            list(self._views.values()),
        )
        if now != self._state:
            self._state = now
            self._directory.write(now)
        self._changed.set()

    async def _fetch(self, model: Model, here: machine.Machine) -> None:
        uri = parse_uri(model.uri)
        at = f"file://{here.claims[uri.claim]}/{uri.path}".rstrip("/") if isinstance(uri, ClaimURI) else str(uri)
        command = (*self._config.engine.fetch, at, *([model.revision] if model.revision else []))
        env = {**host_environment(), "KVASIR_CACHE": str(cache_folder())}
        begun = time.monotonic()

        def progress(stage: str, done: int, total: int) -> None:
            self._report(events.Fetching(stage, done, total))

        fetching = asyncio.ensure_future(fetch.fetch(command, env, progress))
        stopping = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait({fetching, stopping}, return_when=asyncio.FIRST_COMPLETED)
            self._metadata = await fetching if fetching.done() else None
        finally:
            for task in (fetching, stopping):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, LocalError):
                    await task
        if not self._stop.is_set():
            self._report(events.Fetched(time.monotonic() - begun))

    def _routers(self) -> tuple[Sequence[PodAddress], str]:
        """The routers that accept connections, or why there are none."""
        routers = [pod for pod in self._pods if pod.planned.role == "router"]
        ready = [p.planned.address for p in routers if p.runner.ready and not p.runner.stopping]
        views = [self._views[p.planned.name] for p in routers]
        return ready, "; ".join(f"{v.name} is {v.state}{f': {v.message}' if v.message else ''}" for v in views)

    async def _ready(self) -> bool:
        """Wait until all pods are ready (True) or the run is stopped (False). Raises LocalError if a pod cannot
        become ready."""
        limit = self._config.timeout or None
        try:
            async with asyncio.timeout(limit):
                while not self._stop.is_set():
                    if all(pod.runner.ready for pod in self._pods):
                        return True
                    for pod in self._pods:
                        self._fail_if_hopeless(pod)
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            late = [v for v in self._views.values() if not v.ready]
            why = "; ".join(f"{v.name} is {v.state}{f': {v.message}' if v.message else ''}" for v in late)
            raise LocalError(f"not ready after {limit:g} s: {why}", status=1) from None
        return False

    def _fail_if_hopeless(self, pod: RunningPod) -> None:
        """Raise LocalError if another restart will not make the pod ready."""
        failure = pod.failure
        if failure is None or pod.was_ready:
            return
        if failure.exit_code in _HOPELESS or pod.restarts >= _RESTARTS:
            message = failure.message or f"exit status {failure.exit_code}"
            raise LocalError(f"{pod.planned.name}: {message}\nits log: {pod.runner.log_path()}", status=1)

    async def _stop_pods(self) -> None:
        self._stop.set()
        assert self._proxy is not None
        self._proxy.stop()
        # Routers first: what they still answer needs the workers.
        for routers in (True, False):
            async with asyncio.TaskGroup() as tasks:
                for group in self._groups:
                    if (group.role == "router") == routers:
                        tasks.create_task(group.stop())
