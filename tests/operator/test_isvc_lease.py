"""Leader election: never two at once, whatever is slow, lost, stopped or cut off, and others when one is gone."""

import asyncio
import json
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import urllib3

from kvasir_operator.cluster.client import ClientTransport, Cluster
from kvasir_operator.cluster.election import Leadership
from kvasir_operator.cluster.interface import ClusterError
from kvasir_operator.cluster.lease_candidate import LeaseCandidate, Record, Timing
from kvasir_operator.cluster.lease_client import ClusterLease, record, spec


class Store:
    """The Lease at the API server: a write needs the version that was read."""

    def __init__(self) -> None:
        self.record: Record | None = None
        self.version = 0

    def write(self, proposed: Record) -> bool:
        current = self.record.version if self.record else ""
        if proposed.version != current:
            return False
        self.version += 1
        self.record = msgspec.structs.replace(proposed, version=str(self.version))
        return True


class Replica:
    """A candidate in virtual time, with a clock of its own and a network that delays and loses."""

    def __init__(self, name: str, rng: random.Random, store: Store, timing: Timing) -> None:
        self.candidate = LeaseCandidate(name, timing)
        self.offset = rng.uniform(-1e6, 1e6)
        self.rng, self.store = rng, store
        self.next = rng.uniform(0, 3)
        self.alive = True
        self.steps: list[tuple[float, Callable[[float], None]]] = []

    def clock(self, now: float) -> float:
        return now + self.offset

    def leads(self, now: float) -> bool:
        return self.alive and self.candidate.left(self.clock(now)) > 0

    def attempt(self, now: float) -> None:
        """One attempt, its read, write and answer each some time after the last."""
        slow = self.rng.choice([0.01, 0.1, 2.0, 12.0])
        lost = self.rng.random() < 0.15
        started = self.clock(now)
        read_at = now + self.rng.uniform(0, slow)
        told_at = read_at + self.rng.uniform(0, slow)
        written_at = told_at + self.rng.uniform(0, slow)
        done_at = written_at + self.rng.uniform(0, slow)
        found: dict[str, Any] = {}

        def read(_: float) -> None:
            found["record"] = self.store.record

        def told(at: float) -> None:
            found["proposed"] = self.candidate.proposal(found["record"], self.clock(at), "now")

        def written(_: float) -> None:
            found["ok"] = found["proposed"] is not None and self.store.write(found["proposed"])

        def done(_: float) -> None:
            if found["ok"] and not lost:
                self.candidate.written(started)

        self.steps = [(read_at, read), (told_at, told), (written_at, written), (done_at, done)]
        # A process that is stopped for a while between attempts, or runs as it should.
        self.next = done_at + self.rng.choice([2.0, 2.0, 2.0, 20.0, 60.0])


def history(seed: int, seconds: float = 600.0) -> tuple[int, set[str]]:
    """Run three replicas. Returns the most leaders at any time, and who led at all."""
    rng = random.Random(seed)
    store = Store()
    replicas = [Replica(name, rng, store, Timing()) for name in "abc"]
    most, led, now = 0, set(), 0.0
    while now < seconds:
        times = [t for r in replicas if r.alive for t in ([r.steps[0][0]] if r.steps else [r.next])]
        now = max(now, min(times))
        for replica in replicas:
            if replica.alive and replica.steps and replica.steps[0][0] <= now:
                replica.steps.pop(0)[1](now)
            elif replica.alive and not replica.steps and replica.next <= now:
                replica.attempt(now)
        leaders = [r.candidate.identity for r in replicas if r.leads(now)]
        most, led = max(most, len(leaders)), led | set(leaders)
        if rng.random() < 0.002 and sum(r.alive for r in replicas) > 1:
            rng.choice([r for r in replicas if r.alive]).alive = False
    return most, led


def test_there_are_never_two_leaders_and_sometimes_others() -> None:
    outcomes = [history(seed) for seed in range(300)]
    assert {most for most, _ in outcomes} == {1}
    assert max(len(led) for _, led in outcomes) == 3, "the schedules did change leaders"


def test_the_histories_would_show_a_leader_that_stops_too_late() -> None:
    """The check can fail: a fence that outlasts the Lease gives two leaders in some schedule."""

    class Late(LeaseCandidate):
        def written(self, started: float) -> None:
            self._until = started + 60.0

    original = Replica.__init__

    def init(self: Replica, name: str, rng: random.Random, store: Store, timing: Timing) -> None:
        original(self, name, rng, store, timing)
        self.candidate = Late(name, timing)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Replica, "__init__", init)
        assert max(history(seed)[0] for seed in range(100)) > 1


def test_a_dead_leaders_lease_is_taken_after_its_duration_and_not_before() -> None:
    store, taker = Store(), LeaseCandidate("b")
    assert store.write(Record("a", 15, "then", "then"))
    assert taker.proposal(store.record, 100.0, "now") is None, "how long it was silent before is not known"
    assert taker.proposal(store.record, 114.9, "now") is None
    proposed = taker.proposal(store.record, 115.0, "now")
    assert proposed is not None
    assert (proposed.holder, proposed.transitions, proposed.version) == ("b", 1, "1")


def test_a_sign_of_life_starts_the_wait_anew() -> None:
    store, taker = Store(), LeaseCandidate("b")
    store.write(Record("a", 15, "then", "then"))
    taker.proposal(store.record, 100.0, "now")
    store.write(Record("a", 15, "then", "then", version="1"))
    assert taker.proposal(store.record, 114.0, "now") is None
    assert taker.proposal(store.record, 128.0, "now") is None
    assert taker.proposal(store.record, 129.0, "now") is not None


def test_a_lease_that_was_left_is_taken_at_once() -> None:
    store, leaver, taker = Store(), LeaseCandidate("a"), LeaseCandidate("b")
    store.write(leaver.proposal(None, 0.0, "now") or pytest.fail("no Lease is anybody's"))
    leaver.written(0.0)
    assert leaver.left(3.0) == 7.0
    resigned = leaver.resignation(store.record, "later")
    assert resigned is not None
    assert store.write(resigned)
    assert leaver.left(3.0) <= 0
    assert taker.proposal(store.record, 3.0, "now") is not None


def test_who_does_not_hold_the_lease_has_nothing_to_resign() -> None:
    assert LeaseCandidate("a").resignation(None, "now") is None
    assert LeaseCandidate("a").resignation(Record("b", 15, "", ""), "now") is None


def test_a_leader_that_reads_anothers_name_stops_at_once() -> None:
    candidate = LeaseCandidate("a")
    candidate.written(0.0)
    assert candidate.left(1.0) > 0
    candidate.proposal(Record("b", 15, "", "", version="9"), 1.0, "now")
    assert candidate.left(1.0) <= 0


class Lease:
    """The Lease for `Leadership`, which can be out of reach."""

    def __init__(self) -> None:
        self.store = Store()
        self.away = False

    def read(self) -> Record | None:
        if self.away:
            raise ClusterError(0, "away")
        return self.store.record

    def write(self, record: Record) -> bool:
        return self.store.write(record)


def test_a_leader_that_cannot_renew_stops_before_another_begins() -> None:
    now = [0.0]
    lease = Lease()
    first = Leadership(LeaseCandidate("a"), lease, lambda: now[0])
    second = Leadership(LeaseCandidate("b"), lease, lambda: now[0])
    first.attempt()
    second.attempt()
    assert (first.left() > 0, second.left() > 0) == (True, False)
    stopped = began = 0.0
    while second.left() <= 0:
        now[0] += 0.5
        lease.away = True
        with pytest.raises(ClusterError):
            first.attempt()
        lease.away = False
        second.attempt()
        stopped = stopped or (now[0] if first.left() <= 0 else 0.0)
        began = now[0]
    assert stopped == 10.0
    assert began == 15.0


async def test_work_begins_when_the_lease_is_taken_and_everything_is_looked_at_again() -> None:
    lease, told = Lease(), []
    leadership = Leadership(LeaseCandidate("a"), lease)
    running = asyncio.create_task(leadership.run(lambda: told.append("all")))
    await asyncio.wait_for(leadership.wait(), 60)
    assert told == ["all"]
    running.cancel()
    leadership.resign()
    assert leadership.left() <= 0
    assert lease.store.record is not None
    assert lease.store.record.holder == ""


def test_a_lease_object_says_what_its_record_says() -> None:
    found = Record("a", 15, "2026-01-01T00:00:00.000000Z", "2026-01-01T00:00:02.000000Z", 3, "7")
    assert record({"metadata": {"resourceVersion": "7"}, "spec": spec(found)}) == found
    assert record({"metadata": {}}) == Record("", 0, "", "")


@pytest.mark.parametrize(("status", "taken"), [(200, True), (201, True), (409, False), (404, False)])
def test_a_lease_is_written_where_nobody_was_first(status: int, taken: bool) -> None:
    sent: list[tuple[str, str, Any]] = []

    def send(method: str, path: str, query: Any, body: Any, content_type: str) -> tuple[int, bytes]:
        sent.append((method, path, body))
        return status, b"{}"

    lease = ClusterLease(send, "kvasir-system", "kvasir")
    assert lease.write(Record("a", 15, "t", "t")) is taken
    assert lease.write(Record("a", 15, "t", "t", version="5")) is taken
    (create, update) = sent
    leases = "/apis/coordination.k8s.io/v1/namespaces/kvasir-system/leases"
    assert create[:2] == ("POST", leases)
    assert "resourceVersion" not in create[2]["metadata"]
    assert update[:2] == ("PUT", f"{leases}/kvasir")
    assert update[2]["metadata"]["resourceVersion"] == "5"


def test_a_server_that_refuses_the_lease_is_an_error() -> None:
    def send(*_: Any) -> tuple[int, bytes]:
        return 403, b'{"message": "leases is forbidden"}'

    lease = ClusterLease(send, "n", "kvasir")
    with pytest.raises(ClusterError, match="forbidden"):
        lease.read()
    with pytest.raises(ClusterError, match="forbidden"):
        lease.write(Record("a", 15, "t", "t"))


@contextmanager
def api_server(hang: threading.Event) -> Iterator[tuple[str, list[str]]]:
    """A server that notes requests, and answers GET at once and others when told."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.command)
            if self.command != "GET":
                hang.wait(60)
            body = json.dumps({"items": []}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_PATCH = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
    finally:
        hang.set()
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_fence_stops_writes_and_waits_for_none_beyond_it() -> None:
    left = [2.0]
    hang = threading.Event()
    with api_server(hang) as (url, seen), urllib3.PoolManager() as pool:
        configuration = SimpleNamespace(host=url, auth_settings=dict)
        client = SimpleNamespace(configuration=configuration, rest_client=SimpleNamespace(pool_manager=pool))
        cluster = Cluster(ClientTransport(client, lambda: left[0]))
        with pytest.raises(ClusterError, match="cannot be reached") as error:
            cluster.set_status("default", "llama", {})
        assert error.value.status == 0
        hang.set()
        left[0] = 0.0
        with pytest.raises(ClusterError, match="does not lead") as error:
            cluster.set_status("default", "llama", {})
        assert not error.value.final, "it is tried again, by whoever leads"
        assert cluster.pods("default", "llama") == []
        assert seen == ["PATCH", "GET"]
