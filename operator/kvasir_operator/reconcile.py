"""One reconcile: read, decide (all of it in pure modules), write. Blocking, for use in a thread.

Nothing is remembered between reconciles, so it does not matter which event led to one or how many were missed.
"""

import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import msgspec

from kvasir_operator import status as statuses
from kvasir_operator.observed import Observed, Reference, observe, reference
from kvasir_operator.plan import Apply, Delete, Scale, Wait, plan
from kvasir_operator.plan.preload import PRELOAD, Progress, loading
from kvasir_operator.port import ClusterError, ClusterPort, ForeignObject
from kvasir_operator.render import Object, Options, render
from kvasir_operator.render.monitoring import OPTIONAL_KINDS
from kvasir_operator.render.names import PAUSED, ROLE_LABEL
from kvasir_operator.render.network import url
from kvasir_operator.spec import InferenceService, InvalidService, Model, parse
from kvasir_operator.validate import ModelFacts, fact_problems

log = logging.getLogger("kvasir.reconcile")


class Reconciler:
    """Reconciles InferenceServices of one cluster.

    `facts` is asked for a model's facts, `now` for the time, `progress` how far the Job's pod at an address is;
    `again` is told of services (namespace, name) that change without an event.
    """

    def __init__(
        self,
        cluster: ClusterPort,
        options: Options,
        facts: Callable[[Model], ModelFacts | None],
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        progress: Callable[[str], Progress | None] = lambda ip: None,
        again: Callable[[str, str], None] = lambda namespace, name: None,
    ) -> None:
        self._cluster = cluster
        self._options = options
        self._facts = facts
        self._now = now
        self._progress = progress
        self._again = again

    def reconcile(self, namespace: str, name: str) -> bool:
        """Take an InferenceService a step further. False when it is gone.

        Raises ClusterError when something is left to do that no event will remind of.
        """
        document = self._cluster.get_service(namespace, name)
        if document is None:
            return False
        if "deletionTimestamp" in document["metadata"]:
            return True  # the API server's garbage collection does the rest
        try:
            service = parse(document)
            if problems := fact_problems(service, self._facts(service.spec.model)):
                raise InvalidService(problems)
        except InvalidService as error:
            self._reject(document, error)
            return True
        self._realize(document, service)
        return True

    def _reject(self, document: Object, error: InvalidService) -> None:
        previous, generation = document.get("status", {}), document["metadata"].get("generation", 0)
        self._publish(document, statuses.rejected(error.problems, generation, previous, self._now()))

    def _realize(self, document: Object, service: InferenceService) -> None:
        desired = self._servable(document, render(service, self._options))
        pods = self._cluster.pods(service.namespace, service.name)
        observed = observe(self._cluster.owned(service.namespace, service.name, service.uid), pods)
        paused = document["metadata"].get("annotations", {}).get(PAUSED) == "true"
        failures = {} if paused else self._execute(service, desired, observed)
        cached = loading(desired, observed, self._loaded(pods))
        if cached and not cached.done:
            self._again(service.namespace, service.name)
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
        )
        self._publish(document, status)
        for error in failures.values():
            raise error  # the status has them all; this one makes the queue come back

    def _loaded(self, pods: list[Object]) -> Progress | None:
        """How far the running pod of the Job is that loads the model."""
        running = [
            pod["status"]["podIP"]
            for pod in pods
            if pod["metadata"]["labels"][ROLE_LABEL] == PRELOAD and pod.get("status", {}).get("podIP")
        ]
        return next(filter(None, map(self._progress, running)), None)

    def _servable(self, document: Object, desired: list[Object]) -> list[Object]:
        """`desired` without the objects whose API this server has not got, which an Event tells of."""
        result = []
        for item in desired:
            if self._cluster.serves(item["apiVersion"], item["kind"]):
                result.append(item)
            elif item["kind"] not in OPTIONAL_KINDS:
                what = f"{item['apiVersion']} {item['kind']}"
                message = f"{reference(item)} is left out: this cluster does not serve {what}"
                self._cluster.event(document, True, "APINotServed", message, self._stamp(), what)
        return result

    def _execute(
        self, service: InferenceService, desired: list[Object], observed: Observed
    ) -> dict[Reference, ClusterError]:
        """Apply the plan's steps. What the API server refuses is returned; without an answer it raises."""
        failures: dict[Reference, ClusterError] = {}
        for step in plan(desired, observed, service.spec.rollout):
            match step:
                case Apply(object=item):
                    target = reference(item)
                    log.info("apply object=%s namespace=%s", target, service.namespace)
                    try:
                        if target not in observed.objects and self._cluster.foreign(item):
                            raise ForeignObject(target)
                        self._cluster.apply(item)
                    except ClusterError as error:
                        if not error.final:
                            raise
                        log.warning("refused object=%s reason=%s", target, error)
                        failures[target] = error
                case Scale(target=target, replicas=replicas, version=version):
                    log.info("scale object=%s namespace=%s replicas=%d", target, service.namespace, replicas)
                    self._cluster.scale(service.namespace, target, replicas, version)
                case Delete(target=target):
                    log.info("delete object=%s namespace=%s", target, service.namespace)
                    self._cluster.delete(service.namespace, target)
                case Wait(reason=reason):
                    log.info("wait service=%s/%s reason=%s", service.namespace, service.name, reason)
        return failures

    def _publish(self, document: Object, status: statuses.Status) -> None:
        """Write the status where it is another than before, with an Event for every condition that changed."""
        previous: dict[str, Any] = document.get("status", {})
        current = msgspec.to_builtins(status)
        if statuses.same(current, previous):
            return
        metadata = document["metadata"]
        self._cluster.set_status(metadata["namespace"], metadata["name"], current)
        for condition in statuses.transitions(previous, status):
            bad, since = condition.status == "False", condition.last_transition_time
            occasion = f"{condition.type} {condition.status} {since}"
            reason = condition.type if not bad else f"Not{condition.type}"
            message = f"{condition.reason}: {condition.message}"
            self._cluster.event(document, bad, reason, message, since, occasion)

    def _stamp(self) -> str:
        return self._now().strftime("%Y-%m-%dT%H:%M:%SZ")
