"""The controller's wiring: kopf brings events, the queue spreads work, a Lease elects the leader."""

import asyncio
import logging
import socket
import uuid
from collections.abc import Sequence
from typing import Any

import kopf
import msgspec
from prometheus_client import CollectorRegistry, start_http_server

from kvasir_operator.admission.webhook import refusal
from kvasir_operator.api import (
    API_VERSION,
    GROUP,
    PLURAL,
    ROLE_PLURAL,
    SET_API_VERSION,
    SET_KIND,
    SET_PLURAL,
    VERSION,
)
from kvasir_operator.cluster.authority_store import AuthorityStore
from kvasir_operator.cluster.client import ClientTransport, Cluster
from kvasir_operator.cluster.election import Leadership
from kvasir_operator.cluster.interface import ClusterError
from kvasir_operator.cluster.lease_candidate import LeaseCandidate
from kvasir_operator.cluster.lease_client import ClusterLease
from kvasir_operator.cluster.watchdog import Watchdog
from kvasir_operator.metrics import OperatorMetrics
from kvasir_operator.reconcile.certificates import CertificateManager
from kvasir_operator.reconcile.model_metadata import ModelMetadataReader
from kvasir_operator.reconcile.ownership import OtherOperators
from kvasir_operator.reconcile.pod_owners import PodOwners
from kvasir_operator.reconcile.pod_reader import PodReader
from kvasir_operator.reconcile.reconciler import Reconciler, utc_now
from kvasir_operator.reconcile.work_queue import WorkQueue
from kvasir_operator.render import Options
from kvasir_operator.render.names import SERVICE_LABEL
from kvasir_operator.scaling.autoscaler import WAKE_SECONDS, Autoscaler

log = logging.getLogger("kvasir.operator")

# What an InferenceService's status and next steps depend on, beside itself.
WATCHED = (
    ("apps", "v1", "deployments"),
    ("", "v1", "pods"),
    ("", "v1", "services"),
    ("batch", "v1", "jobs"),
    (GROUP, VERSION, ROLE_PLURAL),
)
# And where it is installed.
WATCHED_IF_SERVED = (SET_API_VERSION.partition("/")[0], SET_API_VERSION.partition("/")[2], SET_PLURAL)
# How often the watches are checked against a list.
WATCHDOG_SECONDS = 60.0
LEASE_SECONDS = 5.0  # for one request of the election
CHUNK = 500  # objects of one answer when all are listed

Key = tuple[str, str]


class Webhook(msgspec.Struct, frozen=True):
    """Where the admission webhook listens, and its certificate's files, which are read again when they change."""

    port: int
    certificate: str
    key: str


class ControllerSettings(msgspec.Struct, frozen=True):
    """How to run. `namespaces` empty: all. `lease`: namespace and name of the Lease, `None`: no election.
    `authority`: namespace and name of the Secret with the authorities that sign pods' certificates.

    `metrics_port` 0: no metrics. `webhook` `None`: no admission webhook.
    """

    namespaces: tuple[str, ...]
    options: Options
    liveness: str
    authority: tuple[str, str]
    lease: tuple[str, str] | None = None
    metrics_port: int = 0
    webhook: Webhook | None = None


class WatchDied(Exception):
    """A watch sends no events of objects that changed, or there is more to watch; only a new process has new
    watches."""


class Controller:
    """Runs one replica of the operator."""

    def __init__(self, client: Any, setup: ControllerSettings) -> None:
        self._setup = setup
        self._leadership = _leadership(client, *setup.lease) if setup.lease else None
        transport = ClientTransport(client, self._leadership.left if self._leadership else None)
        self._cluster = Cluster(transport, by_cert_manager=setup.options.issuer is not None)
        self._queue: WorkQueue[Key] = WorkQueue(self._handle)
        self._read_metadata = ModelMetadataReader().read
        self._metrics = OperatorMetrics(CollectorRegistry())
        pods = PodReader()
        self._autoscaler = Autoscaler(pods, utc_now, self._requeue_after, self._metrics.scaling.show)
        self._reconciler = Reconciler(
            self._cluster,
            setup.options,
            self._read_metadata,
            utc_now,
            pods,
            self._requeue_after,
            self._autoscaler,
            self._metrics.capacity.show,
            OtherOperators(lambda namespace, name: ClusterLease(ClientTransport(client), namespace, name).read()),
            CertificateManager(self._cluster, AuthorityStore(transport, *setup.authority), utc_now),
            PodOwners(self._cluster),
        )
        self._metrics.leader.set_function(lambda: self._leadership is None or self._leadership.left() > 0)
        self._metrics.services.set_function(lambda: len(self._services))
        self._services: set[Key] = set()
        self._watchdogs = {PLURAL: Watchdog[Key](), "deployments": Watchdog[Key]()}
        self._watched: tuple[tuple[str, str, str], ...] = WATCHED
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Work until SIGTERM, then leave the Lease to the next. Raises WatchDied."""
        self._loop = asyncio.get_running_loop()
        if self._setup.metrics_port:
            start_http_server(self._setup.metrics_port, registry=self._metrics.registry)
        await self._choose_watches()
        log.info("watching namespaces=%s", ",".join(self._setup.namespaces) or "all")
        beside = [asyncio.create_task(self._watch_the_watches()), asyncio.create_task(self._wake())]
        if self._leadership:
            beside.append(asyncio.create_task(self._leadership.run(self._all_again)))
        for task in beside:
            task.add_done_callback(lambda _: self._stop.set())  # neither ends by itself but by an error
        try:
            await kopf.operator(
                registry=self._registry(),
                settings=_settings(self._setup.webhook, self._watched),
                standalone=True,  # kopf's peering is no leader election
                clusterwide=not self._setup.namespaces,
                namespaces=self._setup.namespaces,
                liveness_endpoint=self._setup.liveness,
                stop_flag=self._stop,
            )
        finally:
            for task in beside:
                task.cancel()
            ended = await asyncio.gather(*beside, return_exceptions=True)
            await self._queue.close()
            await self._loop.shutdown_default_executor()  # what runs in threads may still write
            self._resign()
        for outcome in ended:
            if isinstance(outcome, Exception):
                raise outcome

    async def _choose_watches(self) -> None:
        """What is not served cannot be watched: where it is installed later, a new process watches it."""
        if await asyncio.to_thread(self._has_sets):
            self._watched = (*WATCHED, WATCHED_IF_SERVED)

    async def _handle(self, key: Key) -> bool:
        if self._leadership:
            await self._leadership.wait()
        result = "retried"
        try:
            with self._metrics.seconds.time():
                alive = await asyncio.to_thread(self._reconciler.reconcile, *key)
            result = "done"
        finally:
            self._metrics.reconciles.labels(result).inc()
        return alive

    def _requeue_after(self, namespace: str, name: str, seconds: float) -> None:
        self._loop.call_soon_threadsafe(self._queue.add_later, (namespace, name), seconds)

    def _all_again(self) -> None:
        for key in self._services:
            self._queue.add(key)

    def _resign(self) -> None:
        if self._leadership:
            try:
                self._leadership.resign()
            except ClusterError as error:
                log.warning("the lease is left to expire reason=%s", error)

    async def _watch_the_watches(self) -> None:
        watched = {PLURAL: (API_VERSION, ""), "deployments": ("apps/v1", SERVICE_LABEL)}
        while True:
            await asyncio.sleep(WATCHDOG_SECONDS)
            for plural, watchdog in self._watchdogs.items():
                api_version, labels = watched[plural]
                try:
                    listed = await asyncio.to_thread(self._versions, api_version, plural, labels)
                except ClusterError as error:
                    log.warning("cannot check the watch of %s reason=%s", plural, error)
                    continue
                if silent := watchdog.compare(listed):
                    raise WatchDied(f"the watch of {plural} says nothing of {len(silent)}, as {min(silent)}")
            if WATCHED_IF_SERVED not in self._watched and await asyncio.to_thread(self._has_sets):
                raise WatchDied(f"{SET_API_VERSION} is served now, and not yet watched")

    def _has_sets(self) -> bool:
        """Whether LeaderWorkerSet is installed; an API server that does not answer proves nothing about it."""
        try:
            return self._cluster.serves(SET_API_VERSION, SET_KIND)
        except ClusterError:
            return False

    async def _wake(self) -> None:
        """Reconcile services without workers as soon as their routers hold requests."""
        while True:
            await asyncio.sleep(WAKE_SECONDS)
            for key in await asyncio.to_thread(self._autoscaler.wake):
                self._queue.add(key, now=True)

    def _versions(self, api_version: str, plural: str, labels: str) -> dict[Key, str]:
        found: dict[Key, str] = {}
        for namespace in self._setup.namespaces or ("",):
            found |= self._cluster.versions(api_version, plural, namespace, labels)
        return found

    def _registry(self) -> kopf.OperatorRegistry:
        """Every event queues its InferenceService. Event handlers leave no traces on objects."""
        registry = kopf.OperatorRegistry()

        async def on_service(namespace: str, name: str, type: str | None, meta: kopf.Meta, **_: Any) -> None:
            key, deleted = (namespace, name), type == "DELETED"
            self._watchdogs[PLURAL].event(key, meta["resourceVersion"], deleted)
            (self._services.discard if deleted else self._services.add)(key)
            self._queue.add(key, now=True)  # an edit may be what a failing one waits for

        async def on_part(
            namespace: str,
            name: str,
            type: str | None,
            meta: kopf.Meta,
            labels: kopf.Labels,
            resource: Any,
            **_: Any,
        ) -> None:
            if watchdog := self._watchdogs.get(resource.plural):
                watchdog.event((namespace, name), meta["resourceVersion"], type == "DELETED")
            self._queue.add((namespace, labels[SERVICE_LABEL]))

        async def on_admission(body: kopf.Body, old: kopf.Body | None, **_: Any) -> None:
            policy = self._setup.options.template_policy
            if reason := await asyncio.to_thread(refusal, body, old, self._read_metadata, policy):
                raise kopf.AdmissionError(reason, code=422)

        if self._setup.webhook:
            kopf.on.validate(GROUP, VERSION, PLURAL, registry=registry, id="validate")(on_admission)
        kopf.on.login(registry=registry)(kopf.login_via_client)
        kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)(on_service)
        for group, version, plural in self._watched:
            labelled = {SERVICE_LABEL: kopf.PRESENT}
            kopf.on.event(group, version, plural, registry=registry, id=plural, labels=labelled)(on_part)
        return registry


def _leadership(client: Any, namespace: str, name: str) -> Leadership:
    identity = f"{socket.gethostname()}_{uuid.uuid4()}"  # a restarted process is another candidate
    return Leadership(
        LeaseCandidate(identity), ClusterLease(ClientTransport(client, limit=LEASE_SECONDS), namespace, name)
    )


def _settings(webhook: Webhook | None, parts: Sequence[tuple[str, str, str]]) -> kopf.OperatorSettings:
    """How kopf watches. Of `parts` only those of InferenceServices are asked for: kopf keeps what it is sent, and a
    cluster may have ten thousand other pods."""
    settings = kopf.OperatorSettings()
    for group, version, plural in parts:
        settings.watching.label_selectors[group, version, plural] = SERVICE_LABEL
    settings.watching.chunk_size = CHUNK
    if webhook:
        # The chart has made the webhook's configuration: kopf manages none, and needs no rights for it.
        settings.admission.server = kopf.WebhookServer(
            port=webhook.port, certfile=webhook.certificate, pkeyfile=webhook.key
        )
    settings.posting.enabled = False
    settings.scanning.disabled = True  # kinds and namespaces are given; no rights to list CRDs are needed
    settings.watching.connect_timeout = 10.0
    settings.watching.server_timeout = 240  # the API server takes whole seconds only
    return settings
