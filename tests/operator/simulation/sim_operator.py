"""Operators that run the real queue, reconcile and cluster client, over a network that delays, drops and lies.

The reconcile is blocking code. It runs in a greenlet, which leaves at every request and is resumed with the answer
when virtual time has come that far: so anything can happen between any two requests, and a crash is an exception
that no code here can catch, thrown in at a request.
"""

import asyncio
import math
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from greenlet import getcurrent, greenlet
from sim_apply import Object
from sim_load import Decision, Demand, Listener
from sim_server import Server, encoded

from kvasir_operator.api import PLURAL
from kvasir_operator.cluster.client import Cluster
from kvasir_operator.cluster.interface import ClusterError
from kvasir_operator.cluster.watchdog import Watchdog
from kvasir_operator.controller import WATCHDOG_SECONDS, WATCHED, WATCHED_IF_SERVED
from kvasir_operator.reconcile.reconciler import Reconciler
from kvasir_operator.reconcile.work_queue import WorkQueue
from kvasir_operator.render import Options
from kvasir_operator.render.names import SERVICE_LABEL
from kvasir_operator.scaling.autoscaler import Autoscaler

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
WAKE_SECONDS = 5.0
KINDS = (PLURAL, *(plural for _, _, plural in (*WATCHED, WATCHED_IF_SERVED)))

Key = tuple[str, str]
Answer = tuple[int, bytes]


@dataclass
class Network:
    """Between operators and the API server. Chances are per request; `fair` has only short delays."""

    fair: bool = False
    outage: bool = False
    refuse: float = 0.03  # 409, 429, 500 or 503, without effect
    lose: float = 0.02  # no answer; the request may have had its effect
    slow: float = 0.05
    stale: float = 0.15  # a list from up to `stale_seconds` ago
    stale_seconds: float = 10.0
    drop: float = 0.3  # a watch's event that does not come


@dataclass(frozen=True)
class Request:
    """One call of the transport."""

    method: str
    path: str
    query: Mapping[str, str]
    body: Any
    content_type: str


def transport(method: str, path: str, query: Mapping[str, str], body: object, content_type: str) -> Answer:
    """`cluster.Transport`: leaves the greenlet with the request, comes back with its answer."""
    answer: Answer = getcurrent().parent.switch(Request(method, path, query, body, content_type))
    return answer


class Operator:
    """One running operator process."""

    def __init__(
        self,
        name: str,
        server: Server,
        network: Network,
        options: Options,
        demand: Demand,
        unheard: set[Decision],
        chance: random.Random,
        before: Callable[[Request], None],
        observe: Callable[[str, Request, int], None],
        bug: Callable[[str], None],
        dead_watch: Callable[["Operator"], None],
    ) -> None:
        self.name = name
        self.options = options
        self._server = server
        self._network = network
        self._chance = chance
        self._before = before
        self._observe = observe
        self._bug = bug
        self._dead_watch = dead_watch
        self._watchdogs: dict[str, Watchdog[Key]] = {PLURAL: Watchdog(), "deployments": Watchdog()}
        self._loop = asyncio.get_running_loop()
        listener = Listener(demand, unheard)
        self._autoscaler = Autoscaler(listener, self._now, self._again, listener.report)
        self._reconciler = Reconciler(
            Cluster(transport), options, lambda model: None, self._now, demand, self._again, self._autoscaler
        )
        self._queue: WorkQueue[Key] = WorkQueue(self._handle)
        self._deaf: set[str] = set()
        server.watchers.append(self._changed)
        for plural in KINDS:
            self.relist(plural)
        self._loop.call_later(WATCHDOG_SECONDS, self._watch_the_watches)
        self._loop.call_later(WAKE_SECONDS, self._wake)

    def _now(self) -> datetime:
        return EPOCH + timedelta(seconds=self._loop.time())

    def _again(self, namespace: str, name: str, seconds: float) -> None:
        if self._changed in self._server.watchers:
            self._queue.add_later((namespace, name), seconds)

    def _wake(self) -> None:
        """As the controller does, more often."""
        if self._changed not in self._server.watchers:
            return
        for key in self._autoscaler.wake():
            self._queue.add(key, now=True)
        self._loop.call_later(WAKE_SECONDS, self._wake)

    async def stop(self) -> None:
        """Die: what is under way is cut off where it is."""
        self._server.watchers.remove(self._changed)
        self._deaf = set(KINDS)
        await self._queue.close()

    # Watches

    def drop_watch(self, plural: str, seconds: float) -> None:
        """Hear nothing of a kind for some time; then the watch is made anew, with a list. inf: never."""
        self._deaf.add(plural)
        if seconds < math.inf:
            self._loop.call_later(seconds, self.relist, plural)

    def relist(self, plural: str) -> None:
        """What a new watch begins with: an event for everything there is."""
        if self._changed not in self._server.watchers:
            return
        self._deaf.discard(plural)
        for _, item in self._server.items(plural):
            self._changed(plural, item, False, certain=True)

    def _watch_the_watches(self) -> None:
        """As the controller does, which ends its process when a watch is dead."""
        if self._changed not in self._server.watchers:
            return
        for plural, watchdog in self._watchdogs.items():
            items = [item["metadata"] for _, item in self._server.items(plural)]
            listed = {(each["namespace"], each["name"]): each["resourceVersion"] for each in items}
            if not self._network.outage and watchdog.compare(listed):
                self._dead_watch(self)
                return
        self._loop.call_later(WATCHDOG_SECONDS, self._watch_the_watches)

    def _changed(self, plural: str, item: Object, gone: bool, certain: bool = False) -> None:
        if plural not in KINDS or plural in self._deaf:
            return
        lost = not self._network.fair and self._chance.random() < self._network.drop
        if lost and not certain:
            return
        self._loop.call_later(self._delay(), self._deliver, plural, item, gone)

    def _deliver(self, plural: str, item: Object, gone: bool) -> None:
        """As the controller has it."""
        metadata = item["metadata"]
        if self._changed not in self._server.watchers:
            return
        if watchdog := self._watchdogs.get(plural):
            watchdog.event((metadata["namespace"], metadata["name"]), metadata["resourceVersion"], gone)
        if plural == PLURAL:
            self._queue.add((metadata["namespace"], metadata["name"]), now=True)
        elif (name := metadata.get("labels", {}).get(SERVICE_LABEL)) is not None:
            self._queue.add((metadata["namespace"], name))

    # Reconciles

    async def _handle(self, key: Key) -> bool:
        work = greenlet(self._reconcile)
        result: Any = work.switch(*key)
        while not work.dead:
            try:
                answer = await self._send(result)
            except BaseException as error:  # also a crash, which is a cancellation here
                result = work.throw(error)
            else:
                result = work.switch(answer)
        return bool(result)

    def _reconcile(self, namespace: str, name: str) -> bool:
        try:
            return self._reconciler.reconcile(namespace, name)
        except (ClusterError, asyncio.CancelledError):
            raise
        except Exception as error:
            self._bug(f"reconcile of {namespace}/{name} raised {type(error).__name__}: {error}")
            raise

    async def _send(self, request: Request) -> Answer:
        network, chance = self._network, self._chance
        there, back = self._delay(), self._delay()
        if network.outage:
            await asyncio.sleep(there)
            raise ClusterError(0, "simulated: connection refused")
        answered: asyncio.Future[Answer] = self._loop.create_future()
        dice = 1.0 if network.fair else chance.random()

        def arrive() -> None:
            # Runs also when the sender has died meanwhile: what is sent is sent.
            if dice < network.refuse:
                status, body = chance.choice((409, 429, 500, 503)), {"message": "simulated refusal"}
            elif request.method == "GET" and _is_list(request.path) and not network.fair:
                age = chance.uniform(0, network.stale_seconds) if chance.random() < network.stale else 0.0
                status, body = self._server.stale(request.path, request.query, age)
            else:
                self._before(request)
                status, body = self._server.answer(
                    request.method, request.path, request.query, request.body, request.content_type
                )
            self._observe(self.name, request, status)
            if not answered.done():
                answered.set_result((status, encoded(body)))

        lost = network.refuse <= dice < network.refuse + network.lose
        if not lost or chance.random() < 0.5:
            self._loop.call_later(there, arrive)
        if lost:
            await asyncio.sleep(30.0)
            raise ClusterError(0, "simulated: no answer in time")
        answer = await answered
        await asyncio.sleep(back)
        return answer

    def _delay(self) -> float:
        if self._network.fair or self._chance.random() >= self._network.slow:
            return self._chance.uniform(0.001, 0.05)
        return self._chance.uniform(0.05, 15.0)


def _is_list(path: str) -> bool:
    return re.fullmatch(r"/(api/v1|apis/[^/]+/[^/]+)/namespaces/[^/]+/\w+", path) is not None
