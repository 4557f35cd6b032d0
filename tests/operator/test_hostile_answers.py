"""Pods and hubs that answer for ever, without end, or from elsewhere: the operator goes on."""

import contextlib
import gzip
import json
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator

import pytest

from kvasir_engine.status_reports import PairReport, RouterStatus
from kvasir_operator.api import Model
from kvasir_operator.plan.observed import pod_state
from kvasir_operator.reconcile import pod_reader
from kvasir_operator.reconcile.bounded_http import BoundedHttp, Unanswered
from kvasir_operator.reconcile.model_metadata import ModelMetadataReader
from kvasir_operator.reconcile.pod_reader import PodReader
from kvasir_operator.scaling.autoscaler import MOST_ASKED, _in_turn

Answer = Callable[[socket.socket], None]
OK = b"HTTP/1.1 200 OK\r\n"


def trickle(head: bytes, each: bytes) -> Answer:
    def answer(sock: socket.socket) -> None:
        sock.sendall(head)
        while True:
            sock.sendall(each)
            time.sleep(0.05)

    return answer


def endless(sock: socket.socket) -> None:
    sock.sendall(OK + b"Content-Length: 900000000\r\n\r\n")
    while True:
        sock.sendall(b" " * 2**20)


def says(data: bytes) -> Answer:
    return lambda sock: sock.sendall(data)


def body(data: bytes, more: bytes = b"") -> Answer:
    return says(OK + more + b"Content-Length: %d\r\n\r\n" % len(data) + data)


def silent(sock: socket.socket) -> None:
    sock.recv(1)


BOMB = gzip.compress(b" " * 2**26)
HOSTILE: dict[str, Answer] = {
    "a byte at a time": trickle(OK + b"Content-Length: 100000\r\n\r\n", b" "),
    "chunks at a time": trickle(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "a head at a time": trickle(OK + b"X: ", b"x"),
    "heads at a time": trickle(OK, b"X: x\r\n"),
    "status lines at a time": trickle(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "900 MB": endless,
    "nothing": silent,
    "a large head": says(OK + b"X: " + b"x" * 10_000_000 + b"\r\n\r\n"),
    "a compressed bomb": body(BOMB, b"Content-Encoding: gzip\r\n"),
    "deep JSON": body(b"[" * 1_000_000),
    "deep JSON in a field": body(b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "no UTF-8": body(b'{"reason": "\xff\xfe"}'),
    "no HTTP": says(b"\0" * 1000),
    "a redirect": says(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.2:1/\r\nContent-Length: 0\r\n\r\n"),
    "a redirect to a file": says(b"HTTP/1.1 302 Found\r\nLocation: file:///etc/x\r\nContent-Length: 0\r\n\r\n"),
    "a redirect to itself": says(b"HTTP/1.1 302 Found\r\nLocation: /status\r\nContent-Length: 0\r\n\r\n"),
    "a redirect to nothing": says(b"HTTP/1.1 302 Found\r\nLocation: http://[::1\r\nContent-Length: 0\r\n\r\n"),
}


@contextlib.contextmanager
def serving(answer: Answer, address: str = "127.0.0.1", port: int = 0) -> Iterator[int]:
    def one(conn: socket.socket) -> None:
        with conn, contextlib.suppress(OSError):
            conn.recv(65536)
            answer(conn)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=one, args=(sock.accept()[0],), daemon=True).start()

    with socket.create_server((address, port)) as sock:
        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield sock.getsockname()[1]
        finally:
            sock.shutdown(socket.SHUT_RDWR)
            accepting.join()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pod_holds_nobody_and_fills_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pod_reader, "TIMEOUT_SECONDS", 0.5)
    with serving(HOSTILE[name]) as port:
        monkeypatch.setattr(pod_reader, "PORT", port)
        tracemalloc.start()
        assert PodReader().routers(["127.0.0.1"]) == [None]
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
        tracemalloc.stop()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_hub_holds_nobody_and_fills_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvasir_operator.reconcile.model_metadata.TIMEOUT_SECONDS", 0.5)
    with serving(HOSTILE[name]) as port:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        assert ModelMetadataReader().read(Model(uri="hf://org/model")) is None


def test_one_hostile_pod_of_many_takes_nothing_from_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hostile ones hold on until all others have been asked."""
    status = RouterStatus(False, 0, "", PairReport())
    monkeypatch.setattr(pod_reader, "TIMEOUT_SECONDS", 300.0)
    monkeypatch.setattr(pod_reader, "ALL_SECONDS", 300.0)

    def holds(sock: socket.socket) -> None:
        sock.sendall(OK + b"Content-Length: 100000\r\n\r\n")
        with all_asked:
            all_asked.wait_for(lambda: len(answered) >= 30)

    def answers(sock: socket.socket) -> None:
        body(b'{"draining": false, "inflight": 0, "reason": "", "pairs": {}}')(sock)
        with all_asked:
            answered.append(sock)
            all_asked.notify_all()

    all_asked, answered = threading.Condition(), list[socket.socket]()
    with serving(holds) as port, serving(answers, "127.0.0.2", port):
        monkeypatch.setattr(pod_reader, "PORT", port)
        told = PodReader().routers(["127.0.0.1"] * 30 + ["127.0.0.2"] * 30)
    assert [each is None for each in told] == [True] * 30 + [False] * 30
    assert told[-1] == status


def test_a_hub_may_send_us_to_another_path_of_its_own() -> None:
    def answer(sock: socket.socket) -> None:
        asked.append("")
        there = b"HTTP/1.1 307 Temporary Redirect\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n"
        (says(there) if len(asked) == 1 else body(json.dumps({"a": 1}).encode()))(sock)

    asked: list[str] = []
    with serving(answer) as port:
        assert BoundedHttp(100, 5, redirects=True).get(f"http://127.0.0.1:{port}/first") == b'{"a": 1}'
        asked.clear()
        with pytest.raises(Unanswered, match="HTTP 307"):
            BoundedHttp(100, 5).get(f"http://127.0.0.1:{port}/first")


def test_a_redirect_names_the_host_that_it_was_to() -> None:
    with (
        serving(HOSTILE["a redirect"]) as port,
        pytest.raises(Unanswered, match=r"another host: http://127\.0\.0\.2"),
    ):
        BoundedHttp(100, 5, redirects=True).get(f"http://127.0.0.1:{port}/")


def test_every_service_s_first_router_is_asked_before_any_second_one() -> None:
    asleep = {("a", "many"): [f"10.0.0.{n}" for n in range(100)], ("b", "few"): ["10.0.1.1", "10.0.1.2"]}
    turns = _in_turn(asleep)
    assert turns[:4] == [
        (("a", "many"), "10.0.0.0"),
        (("b", "few"), "10.0.1.1"),
        (("a", "many"), "10.0.0.1"),
        (("b", "few"), "10.0.1.2"),
    ]
    assert len(turns) == MOST_ASKED + 2
    assert _in_turn({}) == []


LABELS = {"serving.kvasir.dev/inferenceservice": "llama", "serving.kvasir.dev/role": "router"}


@pytest.mark.parametrize(
    ("owners", "asked"),
    [
        ([{"kind": "ReplicaSet", "name": "llama-router-5d4f", "controller": True}], True),
        ([{"kind": "ReplicaSet", "name": "llama-router", "controller": True}], True),
        ([], False),
        ([{"kind": "ReplicaSet", "name": "llama-router-5d4f"}], False),
        ([{"kind": "ReplicaSet", "name": "llama-routers-5d4f", "controller": True}], False),
        ([{"kind": "ReplicaSet", "name": "other-router-5d4f", "controller": True}], False),
        ([{"kind": "ConfigMap", "name": "llama-router-5d4f", "controller": True}], False),
    ],
)
def test_a_pod_that_only_has_the_labels_is_not_asked(owners: list[dict[str, object]], asked: bool) -> None:
    metadata = {"name": "llama-router-x", "labels": LABELS, "ownerReferences": owners}
    assert pod_state({"metadata": metadata, "status": {"podIP": "10.0.0.1"}}).ip == ("10.0.0.1" if asked else "")
