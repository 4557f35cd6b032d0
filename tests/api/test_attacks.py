"""Attacks on a running server's connections: each fails, and a bystander is served meanwhile."""

import contextlib
import json
import multiprocessing
import os
import resource
import select
import signal
import socket
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
from attacked_server import serve_within

from kvasir_engine.api.http.acceptor import LOG_SECONDS
from kvasir_engine.entrypoints.drain import drain

BODY = json.dumps({"model": "tiny", "prompt": "Hi", "max_tokens": 3}).encode()


LISTENING = "0A"  # a socket's state in /proc/net/tcp
CONTEXT = multiprocessing.get_context("forkserver")


class Attacked:
    """A process of attacked_server.py."""

    def __init__(self, process: ForkServerProcess, port: int, log: Path) -> None:
        assert process.pid is not None
        self.process = process
        self.pid = process.pid
        self.port = port
        self.log = log

    def files(self) -> dict[int, str]:
        """What each of its descriptors is."""
        found = {}
        for each in os.listdir(f"/proc/{self.pid}/fd"):
            with contextlib.suppress(FileNotFoundError):  # closed since it was listed
                found[int(each)] = os.readlink(f"/proc/{self.pid}/fd/{each}")
        return found

    def connections(self) -> int:
        """How many connections to its port it holds open (proc_pid_net(5))."""
        rows = [row.split() for row in Path(f"/proc/{self.pid}/net/tcp").read_text().splitlines()[1:]]
        accepted = {
            f"socket:[{row[9]}]" for row in rows if row[1].endswith(f":{self.port:04X}") and row[3] != LISTENING
        }
        return len(accepted.intersection(self.files().values()))

    def holds_at_last(self, connections: int) -> None:
        """Wait until it holds at most so many connections; those that ended are closed a moment later."""
        deadline = time.monotonic() + 60
        while self.connections() > connections:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def connect(self, sent: bytes = b"", address: str = "127.0.0.1") -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.port), 60, source_address=(address, 0))
        sock.sendall(sent)
        return sock

    def ask(self, sent: bytes, address: str = "127.0.0.1") -> bytes:
        """All that comes until the server closes."""
        with self.connect(sent, address) as sock:
            return read_all(sock)

    def serves(self, address: str = "127.0.0.1") -> bool:
        """Whether a bystander's completion is answered."""
        return self.ask(completion(BODY), address).startswith(b"HTTP/1.1 200")

    def serves_at_last(self, address: str = "127.0.0.1") -> None:
        """Wait until a bystander is served; those before may be refused, or closed as they come."""
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                if self.serves(address):
                    return
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def memory(self) -> int:
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) * 1024


def read_all(sock: socket.socket) -> bytes:
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while data := sock.recv(65536):
            parts.append(data)
    return b"".join(parts)


def completion(body: bytes, more: str = "Connection: close\r\n") -> bytes:
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{more}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


@contextlib.contextmanager
def attacked(tmp_path: Path, *, files: int = 0, **limits: float) -> Iterator[Attacked]:
    log = tmp_path / "log"
    log.touch()
    ours, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=serve_within, args=(limits, files, str(log), theirs))
    process.start()
    theirs.close()
    try:
        yield Attacked(process, ours.recv(), log)
    finally:
        ours.close()
        process.kill()
        process.join()


def test_a_head_that_does_not_end_is_closed_whether_nothing_comes_or_a_byte_at_a_time(tmp_path: Path) -> None:
    with attacked(tmp_path, header_seconds=0.5) as server:
        with server.connect() as silent, server.connect(b"GET / HT") as begun, server.connect() as slow:
            ended = time.monotonic() + 60
            with contextlib.suppress(OSError):
                for byte in b"GET /health HTTP/1.1\r\nX-Long: " + b"x" * 1000:
                    slow.sendall(bytes([byte]))
                    time.sleep(0.05)
                    assert time.monotonic() < ended
            assert [read_all(each) for each in (silent, begun)] == [b"", b""]
        assert server.serves()
        assert "header=" in server.log.read_text()


def test_a_kept_connection_is_closed_when_it_is_idle_too_long(tmp_path: Path) -> None:
    with attacked(tmp_path, idle_seconds=1) as server:
        begun = time.monotonic()
        with server.connect(completion(BODY, "")) as sock:
            assert read_all(sock).startswith(b"HTTP/1.1 200")
        assert time.monotonic() - begun > 0.9


@pytest.mark.parametrize("path", ["/v1/completions", "/nowhere"])
def test_a_body_that_trickles_is_closed(tmp_path: Path, path: str) -> None:
    with attacked(tmp_path, body_seconds=0.5, bytes_per_second=1000) as server:
        deadline = time.monotonic() + 60
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n".encode()
        with server.connect(head) as sock, contextlib.suppress(OSError):
            while True:
                sock.sendall(b" ")
                time.sleep(0.05)
                assert time.monotonic() < deadline
        assert server.serves()


def test_a_body_that_comes_fast_enough_may_take_longer(tmp_path: Path) -> None:
    with attacked(tmp_path, body_seconds=0.5, bytes_per_second=10) as server:
        body = BODY + b" " * 3000
        with server.connect(completion(body)[: -len(body)]) as sock:
            for start in range(0, len(body), 300):
                sock.sendall(body[start : start + 300])
                time.sleep(0.15)
            assert read_all(sock).startswith(b"HTTP/1.1 200")


def test_an_unfinished_body_does_not_hold_a_drain(tmp_path: Path) -> None:
    with attacked(tmp_path, leaving_seconds=0.5, body_seconds=6000) as server:
        assert server.serves()
        with server.connect(completion(BODY)[:-1]):
            drain("127.0.0.1", server.port, 0.0)  # before the test's own time is over
        os.kill(server.pid, signal.SIGTERM)
        server.process.join(60)
        assert server.process.exitcode == 0


def test_idle_connections_make_room_for_those_with_a_request(tmp_path: Path) -> None:
    with attacked(tmp_path, connections=20, per_address=10, settled_seconds=0.1) as server:
        held = [server.connect(address=f"127.0.0.{2 + place // 10}") for place in range(40)]
        try:
            server.serves_at_last("127.0.0.2")  # when they have been idle for long enough to make room
            server.serves_at_last("127.0.0.9")
            assert server.memory() < 2**30
        finally:
            for each in held:
                each.close()


def test_when_requests_take_all_places_probes_are_answered_and_the_rest_is_refused(tmp_path: Path) -> None:
    unfinished = completion(BODY)[:-1]
    with attacked(tmp_path, connections=8, per_address=4, reserve=4) as server:
        held = [server.connect(unfinished, f"127.0.0.{2 + place // 4}") for place in range(8)]
        try:
            probe = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
            assert server.ask(probe, "127.0.0.2").startswith(b"HTTP/1.1 200")
            assert server.ask(probe, "127.0.0.9").startswith(b"HTTP/1.1 200")
            assert server.ask(completion(BODY), "127.0.0.9").startswith(b"HTTP/1.1 503")
            held += [server.connect(unfinished, "127.0.0.9") for _ in range(8)]
            server.holds_at_last(connections=8 + 4)
        finally:
            for each in held:
                each.close()
        server.serves_at_last()


def test_bodies_in_flight_have_a_budget_together(tmp_path: Path) -> None:
    body = BODY + b" " * 2**20
    with attacked(tmp_path, body_bytes=3 * 2**20) as server:
        held = [server.connect(completion(body)[:-1]) for _ in range(8)]
        try:
            answers, waiting = dict.fromkeys(held, b""), list(held)
            deadline = time.monotonic() + 60
            whole = 0
            while (whole < 5 or whole < sum(map(bool, answers.values()))) and time.monotonic() < deadline:
                for each in select.select(waiting, [], [], 0.5)[0]:
                    part = b""
                    with contextlib.suppress(ConnectionResetError):  # it is closed with what it was sent unread
                        part = each.recv(65536)
                    answers[each] += part
                    if not part:
                        waiting.remove(each)
                whole = sum(b"overloaded" in each for each in answers.values())
            refused = [each for each in answers.values() if each]
            assert len(refused) >= 5
            assert all(each.startswith(b"HTTP/1.1 503") and b"overloaded" in each for each in refused)
        finally:
            for each in held:
                each.close()
        server.serves_at_last()


def test_a_client_that_stops_reading_is_cut_off_and_costs_little(tmp_path: Path) -> None:
    body = json.dumps({"model": "tiny", "prompt": "Hi", "max_tokens": 2_000_000, "stream": True}).encode()
    with attacked(tmp_path, write_seconds=1, bytes_per_second=2**20) as server:
        assert server.serves()
        before = server.memory()
        with server.connect(completion(body)) as sock:
            assert sock.recv(10)
            deadline = time.monotonic() + 60
            while "write=1" not in server.log.read_text():
                assert time.monotonic() < deadline
                assert server.memory() - before < 64 * 2**20
                time.sleep(0.05)
        assert server.serves()


def test_the_accept_loop_does_not_spin_when_descriptors_run_out(tmp_path: Path) -> None:
    with attacked(tmp_path, files=64, connections=1000, header_seconds=60) as server:
        assert server.serves()
        pid = server.pid
        server.holds_at_last(connections=0)
        # As if others of the process's files had taken all that were left: the limit is the first free number.
        free = min(set(range(64)) - server.files().keys())
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (free, 64))
        ticks, began = cpu(pid), time.monotonic()
        assert [server.ask(completion(BODY)) for _ in range(50)] == [b""] * 50
        server.process.join(2)
        took = time.monotonic() - began
        assert cpu(pid) - ticks < 1 + took / 4  # a loop that spins takes a core, where it is to be had
        log = server.log.read_text()
        assert "Traceback" not in log
        assert 1 <= log.count("connections cannot be taken") <= 1 + took / LOG_SECONDS
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (64, 64))
        server.serves_at_last()


def cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_more_connections_than_files_are_never_held(tmp_path: Path) -> None:
    with attacked(tmp_path, files=512, connections=1000, settled_seconds=0.1) as server:
        held = [server.connect() for _ in range(600)]
        try:
            # those that wait have to have been idle for a tenth of a second before they make room
            server.serves_at_last()
            assert len(server.files()) < 512
            assert "cannot be taken" not in server.log.read_text()
        finally:
            for each in held:
                each.close()


POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
GET = b"GET /health HTTP/1.1\r\nHost: x\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
SMUGGLED = {
    "CL and TE": POST + b"Content-Length: 5\r\n" + CHUNKED + b"\r\n0\r\n\r\n",
    "TE and CL": POST + CHUNKED + b"Content-Length: 5\r\n\r\n0\r\n\r\n",
    "two lengths": POST + b"Content-Length: 0\r\nContent-Length: 0\r\n\r\n",
    "two codings": POST + CHUNKED + CHUNKED + b"\r\n0\r\n\r\n",
    "TE of another kind": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "bare LF": b"GET /health HTTP/1.1\nHost: x\n\n",
    "one bare LF": b"GET /health HTTP/1.1\r\nHost: x\nX-A: b\r\n\r\n",
    "a bare LF at the end": GET + b"\n",
    "bare CR": GET + b"X-A: b\rX-B: c\r\n\r\n",
    "obs-fold": GET + b"X-A: b\r\n c\r\n\r\n",
    "obs-fold by a tab": GET + b"X-A: b\r\n\tc\r\n\r\n",
    "a space before the colon": POST + b"Content-Length : 5\r\n\r\nhello",
    "a sign in the length": POST + b"Content-Length: +5\r\n\r\nhello",
    "trailers": POST + CHUNKED + b"\r\n0\r\nX-A: b\r\n\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "NUL": GET + b"X-A: \0\r\n\r\n",
    "a large head at once": GET + b"".join(b"X-%d: %s\r\n" % (n, b"b" * 6000) for n in range(3)) + b"\r\n",
    "a long line": b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "many headers": GET + b"A: b\r\n" * 200 + b"\r\n",
    "a head without an end": GET + b"X-A: " + b"b" * 300_000,
}
WHOLE = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    with attacked(tmp_path_factory.mktemp("attacked"), header_seconds=60, body_seconds=60) as running:
        yield running


@pytest.mark.parametrize("name", SMUGGLED)
@pytest.mark.parametrize("before", [b"", WHOLE], ids=["first", "pipelined"])
def test_what_two_parsers_read_differently_is_refused_and_closed(
    server: Attacked, name: str, before: bytes
) -> None:
    with server.connect(before) as sock:
        with contextlib.suppress(OSError):
            sock.sendall(SMUGGLED[name] + WHOLE)
        answer = read_all(sock)
    statuses = [line.split()[1] for line in answer.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]
    good = [b"200"] * bool(before)
    # A reset may overtake the answer: the server closes with bytes unread.
    assert statuses in ([*good, b"400"], good) or (not statuses and before), answer
    assert server.serves()


def test_what_follows_a_chunked_body_is_not_read_as_a_request(server: Attacked) -> None:
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = server.ask(head + chunked + WHOLE)
    assert answer.count(b"HTTP/1.1 200") == 1


@pytest.mark.parametrize("path", ["/drain", "/v1/../drain", "/drain?quiet=0"])
@pytest.mark.parametrize("origin", ["", "Origin: http://evil.example\r\n"])
def test_no_http_request_begins_a_drain(server: Attacked, path: str, origin: str) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{origin}Connection: close\r\nContent-Length: 0\r\n\r\n"
    assert server.ask(head.encode()).startswith(b"HTTP/1.1 404")
    assert server.ask(b"GET /ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").startswith(b"HTTP/1.1 200")


def test_a_page_in_a_browser_gets_no_websocket(server: Attacked) -> None:
    head = (
        b"GET /v1/worker HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\nOrigin: http://evil.example\r\n\r\n"
    )
    assert server.ask(head).startswith(b"HTTP/1.1 403")
