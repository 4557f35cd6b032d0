"""One reconcile: read, decide (all of it in pure modules), write. Blocking, for use in a thread.

Nothing is remembered between reconciles, so it does not matter which event led to one or how many were missed.
"""

import logging
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import msgspec

from kvasir_engine.status_reports import RouterStatus
from kvasir_operator.admission import parse
from kvasir_operator.api import SET_API_VERSION, SET_KIND, InferenceService, InvalidService, Model
from kvasir_operator.api.validation import ModelMetadata, api_problems, model_problems
from kvasir_operator.cluster.interface import ClusterError, ClusterInterface
from kvasir_operator.plan import Delete, plan
from kvasir_operator.plan.observed import Observed, Reference, observe, reference
from kvasir_operator.plan.preload import loading
from kvasir_operator.plan.release import made_with, release_of
from kvasir_operator.plan.workers import paired_capacity, progress
from kvasir_operator.reconcile.certificates import CertificateManager, CertificateResult, issued_before
from kvasir_operator.reconcile.executor import execute
from kvasir_operator.reconcile.ownership import Alive, holder, marked, ours
from kvasir_operator.reconcile.pod_owners import PodOwners
from kvasir_operator.reconcile.pod_statuses import PodStatuses, PodStatusReader
from kvasir_operator.reconcile.status_writer import StatusWriter
from kvasir_operator.render import Object, Options, issued, render, with_release_defaults
from kvasir_operator.render.monitoring import OPTIONAL_KINDS
from kvasir_operator.render.names import PAUSED, ROLES
from kvasir_operator.render.network import url
from kvasir_operator.scaling.autoscaler import Autoscaler
from kvasir_operator.scaling.roles import ScalingStatus, remembered, resized
from kvasir_operator.scaling.sizing import sized
from kvasir_operator.status import derive as statuses
from kvasir_operator.status.evaluate import (
    VERIFIED,
    certificates_of,
    elastic,
    exposed,
    metrics_reachable,
    transfer_encrypted,
)
from kvasir_operator.status.events import StatusEvent, rescalings

log = logging.getLogger("kvasir.reconcile")


# How soon a service is reconciled again where no event announces the change:
LOADING_SECONDS = 2.0  # its model is being loaded
SOON_SECONDS = 1.0  # a canary is under way, or a worker that leaves finishes its requests
FAILED_SECONDS = 10.0  # no canary succeeds
API_SECONDS = 30.0  # the cluster does not serve an API that the spec needs
OTHER_SECONDS = 30.0  # another operator owns the service


def utc_now() -> datetime:
    """The time."""
    return datetime.now(UTC)


class Reconciler:
    """Reconciles InferenceServices of one cluster.

    `read_metadata` reads a model's metadata, `now` the time, `pod_reader` the pods' own status (without it there is
    no condition of canaries). `requeue_after` queues a service (namespace, name, seconds) that changes without an
    event.
    """

    def __init__(
        self,
        cluster: ClusterInterface,
        options: Options,
        read_metadata: Callable[[Model], ModelMetadata | None],
        now: Callable[[], datetime] = utc_now,
        pod_reader: PodStatusReader | None = None,
        requeue_after: Callable[[str, str, float], None] = lambda namespace, name, seconds: None,
        autoscaler: Autoscaler | None = None,
        show_capacity: Callable[[tuple[str, str], tuple[float, float] | None], None] = lambda key, found: None,
        alive: Alive = lambda operator: None,
        certificates: CertificateManager | None = None,
        owners: PodOwners | None = None,
    ) -> None:
        self._owners = owners
        self._alive = alive
        self._certificates = certificates
        self._show_capacity = show_capacity
        self._autoscaler = autoscaler or Autoscaler(pod_reader, now, requeue_after)
        self._cluster = cluster
        self._options = options
        self._read_metadata = read_metadata
        self._now = now
        self._pod_statuses = PodStatuses(pod_reader)
        self._status = StatusWriter(cluster, options.operator, now)
        self._requeue_after = requeue_after

    def reconcile(self, namespace: str, name: str) -> bool:
        """Take an InferenceService a step further. False when it is gone.

        Raises ClusterError when something is left to do that no event will remind of.
        """
        document = self._cluster.get_service(namespace, name)
        if document is None:
            self._forget(namespace, name)
            return False
        if "deletionTimestamp" in document["metadata"]:
            return True  # the API server's garbage collection does the rest
        if not ours(document, self._options):
            self._forget(namespace, name)
            return True
        if other := holder(document, self._options, self._alive):
            self._forget(namespace, name)
            message = (
                f"{self._options.operator} leaves this alone: it is {other}'s, which has the same operator class"
            )
            occasion = f"{self._options.operator} {other}"
            self._cluster.event(document, True, "OtherOperator", message, self._status.timestamp(), occasion)
            self._requeue_after(namespace, name, OTHER_SECONDS)  # nothing tells that the other is gone
            return True
        self._status.claim(document)
        try:
            service = parse(document, policy=self._options.template_policy)
            if problems := model_problems(service, self._read_metadata(service.spec.model)):
                raise InvalidService(problems)
        except InvalidService as error:
            self._reject(document, error)
            return True
        if problems := api_problems(service, lambda: self._cluster.serves(SET_API_VERSION, SET_KIND)):
            self._reject(document, InvalidService(problems))
            self._requeue_after(namespace, name, API_SECONDS)  # nothing tells of what is installed
            return True
        try:
            failures = self._realize(document, service)
        except ClusterError as error:
            if error.final:
                self._report_refused(document, service, error)
            raise
        for refused in failures.values():
            raise refused  # the status has them all; this one makes the queue come back
        return True

    def _forget(self, namespace: str, name: str) -> None:
        self._autoscaler.forget((namespace, name))
        self._show_capacity((namespace, name), None)

    def _reject(self, document: Object, error: InvalidService) -> None:
        self._show_capacity((document["metadata"]["namespace"], document["metadata"]["name"]), None)
        previous, generation = document.get("status", {}), document["metadata"].get("generation", 0)
        # What runs goes on as it was, and its certificates with it.
        before = issued_before(document)
        if before and self._certificates and not self._options.issuer:
            before = self._renewed(document, self._certificates.issue(document)).issued
        self._status.publish(document, statuses.rejected(error.problems, generation, previous, self._now(), before))

    def _report_refused(self, document: Object, service: InferenceService, error: ClusterError) -> None:
        """Report that the API server refuses what the operator needs: `Ready` does not hold for a new spec."""
        previous = document.get("status", {})
        self._status.publish(
            document, statuses.refused_by_api_server(str(error), service.generation, previous, self._now())
        )

    def _realize(self, document: Object, service: InferenceService) -> dict[Reference, ClusterError]:
        """Take a valid service a step further, and write its status. Returns what the API server refused."""
        # Pods last: what is ready counts most, and changes by itself.
        owned = self._cluster.owned(service.namespace, service.name, service.uid)
        removing = document.get("status", {}).get("removing", [])
        pods = self._cluster.pods(service.namespace, service.name)
        if self._owners:
            pods = self._owners.without_foreign_addresses(service.namespace, service.uid, pods, owned)
        observed = observe(owned, pods, removing)
        paused = document["metadata"].get("annotations", {}).get(PAUSED) == "true"
        scaling = self._rescale(document, service, observed, paused)
        sizing = sized(resized(service, scaling), observed)
        service = sizing.service
        release = release_of(service, self._options, document.get("status", {}), observed)
        left_open = service.spec.transfer.encryption is None
        made = made_with(release, self._options)
        service = with_release_defaults(service, made)
        rendered = marked(render(service, made), self._options)
        desired = self._servable(document, rendered)
        unserved = exposed(service, rendered, desired)
        # Before any pod is made, which would wait for its Secret; also of a service that is paused.
        certificates = self._certify(document, service, observed, rendered)
        steps = [] if paused else [*sizing.steps, *plan(desired, observed, service.spec.rollout)]
        self._status.record_removing(document, steps)
        failures = execute(self._cluster, service.namespace, service.name, steps, observed)
        if certificates and certificates.refused:
            failures[certificates.refused[0]] = certificates.refused[1]
        for target, error in failures.items():
            # Once a code: what the message says may be another at each try.
            occasion = f"{target} {error.status} {service.generation}"
            self._status.warn(document, "ApplyFailed", f"{target}: {error}", occasion)
        cached = loading(desired, observed, self._pod_statuses.progress(observed))
        if cached and not cached.done:
            self._requeue_after(service.namespace, service.name, LOADING_SECONDS)
        deleted = {step.target for step in steps if isinstance(step, Delete)}
        capacity = paired_capacity(desired, observed, service.spec.rollout)
        self._show_capacity((service.namespace, service.name), capacity)
        routers, leaving = self._pod_statuses.routers(observed), self._pod_statuses.leaving(observed)
        links = self._pod_statuses.links(observed)
        status = statuses.accepted(
            desired,
            observed,
            {target: str(error) for target, error in failures.items()},
            model=service.served_name,
            url=url(service, desired),
            generation=service.generation,
            previous=document.get("status", {}),
            now=self._now(),
            cached=cached,
            paused=paused,
            routers=None if routers is None else [each for each in routers if each],
            planned=progress(desired, observed, service.spec.rollout),
            leaving=leaving,
            removing=sorted(r.name for r in observed.removing.keys() - deleted),
            scaling=scaling,
            elastic=elastic(service),
            informational=[
                *metrics_reachable(service, self._options.metrics_namespace),
                *unserved,
                *([certificates.condition] if certificates else []),
                *transfer_encrypted(service, kept_off=left_open),
            ],
            certificates=certificates.issued if certificates else None,
            links=links,
        )
        status = msgspec.structs.replace(status, release=release)
        grouped = bool(observed.removing) or any(r.kind == SET_KIND for r in observed.objects)
        self._status.publish(document, status, guarded=grouped or status.scaling is not None)
        if seconds := _recheck_seconds(status, routers or ()):
            self._requeue_after(service.namespace, service.name, seconds)
        return failures

    def _certify(
        self, document: Object, service: InferenceService, observed: Observed, rendered: Sequence[Object]
    ) -> CertificateResult | None:
        """Issue the certificates that are due, or report cert-manager's; `None` where the service has none."""
        if service.spec.transfer.encryption == "Off":
            return None
        if issuer := self._options.issuer:
            wanted = [each for each in rendered if each["kind"] == issued.KIND]
            served = self._cluster.serves(issued.API_VERSION, issued.KIND)
            condition = certificates_of(str(issuer), wanted, observed, served)
            if not condition.true:
                self._requeue_after(service.namespace, service.name, FAILED_SECONDS)  # no watch tells
            return CertificateResult(None, condition)
        if self._certificates is None:
            return None
        waiting = {pod.role for pod in observed.pods if pod.role in ROLES and not pod.ready}
        return self._renewed(document, self._certificates.issue(document, sorted(waiting)))

    def _renewed(self, document: Object, certificates: CertificateResult) -> CertificateResult:
        if certificates.renewed and certificates.issued:
            since, occasion = self._status.timestamp(), certificates.issued.issued_at
            event = StatusEvent(False, "CertificatesRenewed", certificates.renewed, since, occasion)
            self._status.post(document, event)
        return certificates

    def _rescale(
        self, document: Object, service: InferenceService, observed: Observed, paused: bool
    ) -> ScalingStatus | None:
        """The sizes that the operator decides itself. A new size is in `document`'s status before it is applied, so
        that a reconcile after an interruption knows it."""
        previous = document.get("status", {})
        before = remembered(previous)
        if paused:
            return before
        scaling = self._autoscaler.scale(service, observed, previous)
        if scaling is not None and scaling != before:
            document["status"] = {**previous, "scaling": msgspec.to_builtins(scaling)}
            self._status.write(document, document["status"], guarded=True)
            for each in rescalings(before, scaling):
                log.info("rescale service=%s/%s %s", service.namespace, service.name, each.message)
                self._status.post(document, each)
        return scaling

    def _servable(self, document: Object, desired: list[Object]) -> list[Object]:
        """`desired` without the objects whose API this server does not serve; an Event reports each."""
        result = []
        for item in desired:
            if self._cluster.serves(item["apiVersion"], item["kind"]):
                result.append(item)
            elif item["kind"] not in OPTIONAL_KINDS:
                what = f"{item['apiVersion']} {item['kind']}"
                message = f"{reference(item)} is left out: this cluster does not serve {what}"
                self._status.warn(document, "APINotServed", message, what)
        return result


def _recheck_seconds(status: statuses.Status, routers: Sequence[RouterStatus | None]) -> float:
    """After how many seconds the pods are asked again; 0: never. `routers`: what each ready router said."""
    verified = next((c.status for c in status.conditions if c.type == VERIFIED), "True")
    if any(each.requests is not None for each in status.leaving) or (any(routers) and verified == "Unknown"):
        return SOON_SECONDS
    # A worker that does not say what it has may be on a node that is gone, and a ready router that does not answer
    # may have lost one packet, or be out of the operator's reach: no event tells, and nothing is to be hurried for.
    return FAILED_SECONDS if status.leaving or (routers and verified != "True") else 0.0
