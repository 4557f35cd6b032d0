"""The controller's wiring: a replica that does not lead neither works nor writes, and a silent watch ends it."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from kvasir_operator import controller as wiring
from kvasir_operator.cluster.interface import ClusterError
from kvasir_operator.cluster.lease_candidate import Record
from kvasir_operator.controller import Controller, ControllerSettings, WatchDied
from kvasir_operator.render import Options

KEY = ("default", "llama")


def made(lease: bool = True) -> Controller:
    """A controller whose API server cannot be reached."""

    class Unreachable:
        def request(self, *_: Any, **__: Any) -> None:
            raise AssertionError("nothing is to be sent")

    configuration = SimpleNamespace(host="http://unreachable", auth_settings=dict)
    client = SimpleNamespace(configuration=configuration, rest_client=SimpleNamespace(pool_manager=Unreachable()))
    found = Controller(
        client,
        ControllerSettings((), Options(), "", ("system", "authority"), ("system", "kvasir") if lease else None),
    )
    found._has_sets = lambda: False  # type: ignore[method-assign]
    return found


class Lease:
    """A Lease that nobody holds."""

    def read(self) -> Record | None:
        return None

    def write(self, record: Record) -> bool:
        return True


async def test_work_waits_until_this_replica_leads() -> None:
    controller, done = made(), []
    controller._reconciler = SimpleNamespace(reconcile=lambda *key: done.append(key) or True)  # type: ignore[assignment,func-returns-value]
    waiting = asyncio.create_task(controller._handle(KEY))
    await asyncio.sleep(0.05)
    assert done == []
    leadership = controller._leadership
    assert leadership is not None
    leadership._lease = Lease()
    electing = asyncio.create_task(leadership.run(lambda: None))
    assert await asyncio.wait_for(waiting, 60)
    assert done == [KEY]
    electing.cancel()


def test_a_replica_that_does_not_lead_writes_nothing() -> None:
    with pytest.raises(ClusterError, match="does not lead"):
        made()._cluster.set_status("default", "llama", {})


async def test_what_is_known_is_looked_at_again_by_a_new_leader() -> None:
    controller = made()
    added: list[Any] = []
    controller._queue.add = added.append  # type: ignore[method-assign,assignment]
    controller._services |= {KEY, ("default", "other")}
    controller._all_again()
    assert sorted(added) == [KEY, ("default", "other")]


async def test_a_watch_that_stays_silent_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wiring, "WATCHDOG_SECONDS", 0.0)
    controller = made(lease=False)
    controller._versions = lambda *_: {KEY: "5"}  # type: ignore[method-assign]
    with pytest.raises(WatchDied, match=r"watch of inferenceservices says nothing of 1, as \('default', 'llama'\)"):
        await asyncio.wait_for(controller._watch_the_watches(), 60)


async def test_leader_worker_sets_are_watched_where_they_are_installed_and_when_they_are_installed_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wiring, "WATCHDOG_SECONDS", 0.0)
    controller = made(lease=False)
    controller._versions = lambda *_: {}  # type: ignore[method-assign]
    assert "leaderworkersets" not in watched(controller)
    controller._has_sets = lambda: True  # type: ignore[method-assign]
    with pytest.raises(WatchDied, match=r"leaderworkerset.x-k8s.io/v1 is served now, and not yet watched"):
        await asyncio.wait_for(controller._watch_the_watches(), 60)
    await controller._choose_watches()
    assert "leaderworkersets" in watched(controller)
    watching = asyncio.create_task(controller._watch_the_watches())
    looks, enough, loop = iter(range(3)), asyncio.Event(), asyncio.get_running_loop()

    def versions(*_: Any) -> Any:
        if next(looks, None) is None:
            loop.call_soon_threadsafe(enough.set)
        return {}

    controller._versions = versions  # type: ignore[method-assign]
    await asyncio.wait_for(enough.wait(), 60)
    assert not watching.done()
    watching.cancel()


def watched(controller: Controller) -> set[str]:
    """The kinds of which events are heard."""
    return {str(handler.id).rpartition(".")[2] for handler in controller._registry()._watching.get_all_handlers()}


def test_an_api_server_that_is_away_says_nothing_of_what_is_installed() -> None:
    def unreachable(*_: Any) -> bool:
        raise ClusterError(0, "away")

    controller = made(lease=False)
    del controller._has_sets
    controller._cluster.serves = unreachable  # type: ignore[method-assign]
    assert not controller._has_sets()


async def test_an_api_server_that_is_away_proves_nothing_about_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wiring, "WATCHDOG_SECONDS", 0.0)
    controller = made(lease=False)
    looks = 0
    enough = asyncio.Event()
    loop = asyncio.get_running_loop()

    def versions(*_: Any) -> Any:
        nonlocal looks
        looks += 1
        if looks > 6:
            loop.call_soon_threadsafe(enough.set)
        raise ClusterError(0, "away")

    controller._versions = versions  # type: ignore[method-assign]
    watching = asyncio.create_task(controller._watch_the_watches())
    await asyncio.wait_for(enough.wait(), 60)
    assert not watching.done()
    watching.cancel()


async def test_every_event_queues_its_service_and_feeds_the_watchdog() -> None:
    controller = made(lease=False)
    added: list[Any] = []
    controller._queue.add = lambda key, now=False: added.append(key)  # type: ignore[method-assign]
    handlers = {
        str(handler.id).rpartition(".")[2]: handler.fn
        for handler in controller._registry()._watching.get_all_handlers()
    }
    service, part = handlers["on_service"], handlers["deployments"]
    await service(namespace="default", name="llama", type="ADDED", meta={"resourceVersion": "7"})
    labels = {"serving.kvasir.dev/inferenceservice": "llama"}
    await part(
        namespace="default",
        name="llama-router",
        type="MODIFIED",
        meta={"resourceVersion": "8"},
        labels=labels,
        resource=SimpleNamespace(plural="deployments"),
    )
    assert added == [KEY, KEY]
    assert controller._services == {KEY}
    for _ in range(3):
        assert controller._watchdogs["inferenceservices"].compare({KEY: "7"}) == set()
        assert controller._watchdogs["deployments"].compare({("default", "llama-router"): "8"}) == set()
    await service(namespace="default", name="llama", type="DELETED", meta={"resourceVersion": "9"})
    assert controller._services == set()
