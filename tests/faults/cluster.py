"""Workers and routers as processes of their own, on loopback, each to be started, faulted and killed by name."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families
from questions import PAGE, Question

from kvasir_engine.faults import VARIABLE

FORKER = [sys.executable, str(Path(__file__).with_name("process_forker.py"))]
ROLES = {"p": "prefill", "d": "decode", "r": "router"}
PAGES = 96
PAGE_BYTES = 2 * 2 * 2 * PAGE * 16 * 4  # layers, K and V, heads, tokens, dimensions, float32
START_SECONDS = 60.0
PORTS = range(12000, 32000)  # below those that outgoing connections take


@dataclass
class Member:
    """A process and where it serves. `name` is its kind (p, d or r) and a digit."""

    name: str
    port: int
    pid: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def state(self) -> str:
        """As /proc shows it: R, S, T (stopped), ...; empty once it is gone."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2][0]
        except (FileNotFoundError, ProcessLookupError):  # it ended before the file was opened, or after
            return ""

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)
        while self.state:
            time.sleep(0.002)

    def metrics(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """Every sample by name and labels."""
        text = httpx.get(self.url + "/metrics", timeout=60).raise_for_status().text
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def metric(self, name: str, **labels: str) -> float:
        """The samples of `name` that have `labels`, added up."""
        wanted = labels.items()
        return sum(v for (known, has), v in self.metrics().items() if known == name and wanted <= dict(has).items())

    def owned(self) -> dict[str, int]:
        """What is not at rest in a worker: pages neither free nor only cached, and leases, by owner and state."""
        values = self.metrics()
        owners, states = ("held", "leased", "fenced"), ("open", "fenced", "writing", "lent", "reading")
        owned = {f"pages {each}": values["kvasir_kv_pages", (("owner", each),)] for each in owners}
        owned |= {f"leases {each}": values["kvasir_kv_leases", (("state", each),)] for each in states}
        return {what: int(count) for what, count in owned.items() if count}


@dataclass
class Cluster:
    """The members that run, and the ports of all that may."""

    model: Path
    logs: Path
    members: dict[str, Member] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ports = _free_ports([kind + digit for kind in ROLES for digit in "01"])
        self._starts = 0
        self._forker = subprocess.Popen(FORKER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self, *names: str, fault: str = "") -> list[Member]:
        """Start the processes (with `fault` as KVASIR_FAULT) and wait until they serve and the routers know."""
        started = [self.launch(name, fault) for name in names]
        self.wait_ready(*names)
        return started

    def launch(self, name: str, fault: str = "") -> Member:
        """Start one without waiting for it."""
        assert name not in self.members
        port, role = self.ports[name], ROLES[name[0]]
        arguments = ["--model", f"file://{self.model}", "--served-model-name", "small"]
        arguments += ["--host", "127.0.0.1", "--port", str(port), "--drain-seconds", "0"]
        if role == "router":
            workers = [each for each in self.ports if each[0] != "r"]
            arguments += [arg for each in workers for arg in ("--worker", f"http://127.0.0.1:{self.ports[each]}")]
            arguments += ["--remote-threshold", "16"]
        else:
            arguments += ["--role", role, "--dtype", "float32", "--device", "cpu", "--page-size", str(PAGE)]
            arguments += ["--kv-cache-memory", str(PAGES * PAGE_BYTES), "--prefill-chunk", "32"]
            arguments += ["--max-running", "8"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop(VARIABLE, None)
        if fault:
            environment[VARIABLE] = fault
        self._starts += 1
        log = self.logs / f"{self._starts}-{name}.log"
        argv = ["kvasir", "router" if role == "router" else "worker", *arguments]
        assert self._forker.stdin is not None
        assert self._forker.stdout is not None
        self._forker.stdin.write(json.dumps({"argv": argv, "environment": environment, "log": str(log)}) + "\n")
        self._forker.stdin.flush()
        member = self.members[name] = Member(name, port, int(self._forker.stdout.readline()))
        return member

    def wait_ready(self, *names: str) -> None:
        """The named members serve, and every router that runs is connected to every worker that runs."""
        for name in names:
            self.wait(lambda name=name: self._serves(name), f"{name} to serve")  # type: ignore[misc]
        for member in self.routers():
            self.wait(lambda member=member: self._connected(member), f"{member.name} to connect")  # type: ignore[misc]

    def routers(self) -> list[Member]:
        """Those that live."""
        return [member for name, member in self.members.items() if name[0] == "r" and member.state]

    def workers(self) -> list[Member]:
        """Those that live."""
        return [member for name, member in self.members.items() if name[0] != "r" and member.state]

    def _serves(self, name: str) -> bool:
        member = self.members[name]
        assert member.state, f"{name} has ended: {self.log(name)}"
        path = "/health" if name[0] == "r" else "/ready"
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(member.url + path, timeout=60).status_code == 200
        return False

    def _connected(self, router: Member) -> bool:
        return router.metric("kvasir_router_workers", state="ready") == len(self.workers())

    def wait(self, condition: Callable[[], bool], what: str, seconds: float = START_SECONDS) -> float:
        """Poll until `condition`; the seconds it took."""
        began = time.monotonic()
        while not condition():
            assert time.monotonic() < began + seconds, f"waited {seconds} s in vain for {what}"
            time.sleep(0.02)
        return time.monotonic() - began

    def wait_quiet(self, seconds: float) -> float:
        """Until no page of any worker that runs is owned by a request, a lease or a fence; the seconds it took."""
        owned: dict[str, dict[str, int]] = {}

        def quiet() -> bool:
            owned.clear()
            for member in self.workers():
                try:
                    owned[member.name] = member.owned()
                except httpx.TransportError:
                    if member.state:  # if not, it died meanwhile, of a fault that a canary came upon
                        raise
            return not any(owned.values())

        try:
            return self.wait(quiet, "baseline", seconds)
        except AssertionError:
            logs = "\n".join(f"--- {name}\n{self.log(name)}" for name in self.members)
            raise AssertionError(f"pages that nobody gave back within {seconds} s: {owned}\n{logs}") from None

    def wait_settled(self) -> None:
        """Until all that live serve; the dead are forgotten."""

        def settled() -> bool:
            self.members = {name: member for name, member in self.members.items() if member.state}
            try:
                return all(self._serves(name) for name in self.members)
            except AssertionError:
                return False  # one has died

        self.wait(settled, "serving", START_SECONDS)

    def log(self, name: str, lines: int = 30) -> str:
        """The end of a member's last log."""
        logs = sorted(self.logs.glob(f"*-{name}.log"), key=lambda path: int(path.name.partition("-")[0]))
        return "\n".join(logs[-1].read_text().splitlines()[-lines:])

    def kill(self, name: str) -> None:
        """SIGKILL, whatever its state."""
        self.members.pop(name).kill()

    def close(self) -> None:
        for name in list(self.members):
            self.kill(name)
        assert self._forker.stdin is not None
        self._forker.stdin.close()
        self._forker.wait()


def _free_ports(names: list[str]) -> dict[str, int]:
    """A port each that nobody listens on now. Outgoing connections would not take one while its owner is away."""
    ports: dict[str, int] = {}
    with contextlib.ExitStack() as stack:
        while len(ports) < len(names):
            port = random.choice(PORTS)
            with contextlib.suppress(OSError):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
                ports[names[len(ports)]] = port
    return ports


@dataclass
class Answer:
    """What a client got. `error`: the API's error code, or the name of the transport's exception."""

    text: str = ""
    finish: str = ""
    error: str = ""


async def ask(client: httpx.AsyncClient, url: str, question: Question, leave_after: int | None = None) -> Answer:
    """Stream an answer; with `leave_after`, close the connection after so many events."""
    answer = Answer()
    try:
        async with client.stream("POST", url + "/v1/completions", json={**question.body, "stream": True}) as reply:
            if reply.status_code != 200:
                answer.error = json.loads(await reply.aread())["error"]["code"]
                return answer
            if leave_after == 0:
                return answer
            events = 0
            async for line in reply.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    answer.error = event["error"]["code"]
                    return answer
                for choice in event["choices"]:
                    answer.text += choice["text"]
                    answer.finish = choice["finish_reason"] or answer.finish
                events += 1
                if events == leave_after:
                    return answer
    except httpx.TransportError as error:
        answer.error = type(error).__name__
        return answer
    if not answer.finish:
        answer.error = answer.error or "no_end"
    return answer
