"""`kvasir serve` as several processes: one for the engine, and several API processes that share a port.

The parent loads nothing. It starts the others, handles signals and `kvasir drain`, and ends all as soon as one
ends: the remaining ones could not serve, or only partly.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from kvasir_engine.api.http.graceful_shutdown import GracefulShutdown
from kvasir_engine.api.http.server import BACKLOG, bind_shared, check_port, ended_by_signals
from kvasir_engine.entrypoints.process_channel import (
    AcceptRequests,
    ApiSetup,
    BecomeUnready,
    EndProcess,
    EngineSetup,
    EngineUnhealthy,
    FromChild,
    Inflight,
    ProcessChannel,
    ProcessReady,
    ServeOptions,
    ToChild,
)
from kvasir_engine.executor.rank_link import exit_reason_of
from kvasir_engine.private_folders import drain_socket, run_folder
from kvasir_engine.supervisor import Supervisor

log = logging.getLogger("serve")

END_SECONDS = 15.0
"""Seconds that a process has to end, once it was told to."""


@dataclass(eq=False)
class _Child:
    name: str
    process: asyncio.subprocess.Process
    channel: ProcessChannel
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    leaving: bool = False
    inflight: int = 0


class ServeProcesses:
    """The processes. One that ends before it was told to ends all of them, and this process.

    The exit status is 2 for an error of the user's, which the process has then reported, else 1.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        """For their sockets."""
        self._children: list[_Child] = []
        self._apis: list[_Child] = []
        self._tasks = Supervisor(self._end)

    async def start(self, module: str, name: str, *arguments: str, sock: socket.socket | None = None) -> _Child:
        """Start `python -m MODULE ARGUMENTS CHANNEL [SOCKET]`."""
        ours, theirs = socket.socketpair()
        descriptors = [theirs.fileno(), *([] if sock is None else [sock.fileno()])]
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                f"kvasir_engine.entrypoints.{module}",
                *arguments,
                *map(str, descriptors),
                pass_fds=descriptors,
                stdin=asyncio.subprocess.DEVNULL,
            )
        child = _Child(name, process, await ProcessChannel.over(ours, FromChild))
        self._children.append(child)
        if module == "api_process":
            self._apis.append(child)
        self._tasks.start(self._follow(child), f"watch of {name}")
        return child

    def send_to_apis(self, message: ToChild) -> None:
        """Send a message to all API processes."""
        for each in self._apis:
            each.channel.send(message)

    async def leave(self, children: Iterable[_Child]) -> None:
        """Tell these to end, and wait until they have; those that do not are killed."""
        children = list(children)
        for each in children:
            each.leaving = True
            each.channel.send(EndProcess())
        try:
            async with asyncio.timeout(END_SECONDS):
                for each in children:
                    await each.ended.wait()
        except TimeoutError:
            for each in children:
                if not each.ended.is_set():
                    log.error("%s does not end; it is killed", each.name)
                    _kill(each)
                    await each.ended.wait()

    # -- as GracefulShutdown asks

    @property
    def inflight(self) -> int:
        """Requests in flight in all API processes, as last reported."""
        return sum(each.inflight for each in self._apis)

    def drain(self) -> None:
        """Make all API processes unready."""
        self.send_to_apis(BecomeUnready())

    async def _follow(self, child: _Child) -> None:
        while True:
            try:
                message = await child.channel.receive()
            except EOFError:
                break
            match message:
                case ProcessReady():
                    child.ready.set()
                case Inflight(requests):
                    child.inflight = requests
                case EngineUnhealthy():
                    self.send_to_apis(message)
        status = await child.process.wait()
        child.channel.close()
        child.ended.set()
        if not child.leaving:
            loading = not all(each.ready.is_set() for each in self._children)
            its_user = loading and status == 2
            self._end(f"{child.name} {exit_reason_of(status)}; the server ends with it", 2 if its_user else 1)
        self._tasks.forget(asyncio.current_task())

    def _end(self, reason: str, status: int = 1) -> NoReturn:
        if status != 2:
            sys.stderr.write(f"kvasir: error: {reason}\n")
            sys.stderr.flush()
        self.give_up(status)

    def give_up(self, status: int) -> NoReturn:
        """End all at once."""
        for each in self._children:
            _kill(each)
        shutil.rmtree(self.folder, ignore_errors=True)
        os._exit(status)


def _kill(child: _Child) -> None:
    with contextlib.suppress(ProcessLookupError):
        child.process.kill()


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="serve-", dir=run_folder()))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def serve_processes(options: ServeOptions, count: int) -> None:
    """Serve by `count` API processes until SIGTERM or SIGINT; then drain, and return."""
    config = options.config
    check_port(config.host, config.port)
    socks = bind_shared(config.host, config.port, count)
    with _folder() as folder:
        group = ServeProcesses(folder)
        shutdown, loop = GracefulShutdown(group, config.drain_seconds), asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):  # while models are loaded there is nothing to finish
            loop.add_signal_handler(number, group.give_up, 128 + number)
        shown = [folder / f"{name}.metrics" for name in ("engine", *(f"api{number}" for number in range(count)))]
        engine = await group.start("engine_process", "the engine's process")
        apis = [
            await group.start("api_process", f"API process {number} of {count}", str(number), sock=sock)
            for number, sock in enumerate(socks)
        ]
        path = str(folder / "engine.sock")
        engine.channel.send(EngineSetup(config, path, str(shown[0])))
        await engine.ready.wait()
        for each, own in zip(apis, shown[1:], strict=True):
            others = [str(other) for other in shown if other is not own]
            each.channel.send(ApiSetup(options, path, str(own), others))
        for each in apis:
            await each.ready.wait()
        for sock in socks:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.listen(BACKLOG)
        address = socks[0].getsockname()[:2]
        with ended_by_signals(shutdown) as stop:
            async with shutdown.listening_at(drain_socket(*address)):
                for sock in socks:
                    sock.close()  # the API processes have them
                group.send_to_apis(AcceptRequests())
                log.info("serving model=%r address=%s:%d api_processes=%d", options.name, *address, count)
                await stop.wait()
                if left := await shutdown.done():
                    log.warning("cutting off requests inflight=%d", left)
                await group.leave(apis)
                await group.leave([engine])
