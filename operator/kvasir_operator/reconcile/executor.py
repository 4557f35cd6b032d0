"""The steps of a plan, taken at the API server one by one. Blocking, for use in a thread."""

import logging
from collections.abc import Sequence

from kvasir_operator.cluster.interface import ClusterError, ClusterInterface, ForeignObject
from kvasir_operator.plan import Apply, Delete, ReportReplicas, Scale, Step, Wait
from kvasir_operator.plan.observed import Observed, Reference, reference

log = logging.getLogger("kvasir.reconcile")


def execute(
    cluster: ClusterInterface, namespace: str, name: str, steps: Sequence[Step], observed: Observed
) -> dict[Reference, ClusterError]:
    """Take the steps of a plan for the service `name`. What the API server refuses, whatever its code, is returned,
    and keeps no other step from being taken.

    Raises ClusterError without an answer, and where the plan was of an older state than the stored one.
    """
    failures: dict[Reference, ClusterError] = {}
    for step in steps:
        if isinstance(step, Wait):
            log.info("wait service=%s/%s reason=%s", namespace, name, step.reason)
            continue
        target = reference(step.object) if isinstance(step, Apply) else step.target
        try:
            _take(cluster, namespace, step, target, observed)
        except ClusterError as error:
            if not error.refusal or _outdated(step, error):
                raise
            log.warning("refused object=%s reason=%s", target, error)
            failures[target] = error
    return failures


def _take(
    cluster: ClusterInterface,
    namespace: str,
    step: Apply | Scale | Delete | ReportReplicas,
    target: Reference,
    observed: Observed,
) -> None:
    match step:
        case Apply(object=item):
            log.info("apply object=%s namespace=%s", target, namespace)
            if target not in observed.objects and cluster.foreign(item):
                raise ForeignObject(target)
            cluster.apply(item)
        case Scale(replicas=replicas, version=version):
            log.info("scale object=%s namespace=%s replicas=%d", target, namespace, replicas)
            cluster.scale(namespace, target, replicas, version)
        case Delete(uid=uid):
            log.info("delete object=%s namespace=%s", target, namespace)
            cluster.delete(namespace, target, uid)
        case ReportReplicas(replicas=replicas):
            cluster.report(namespace, target, replicas)


def _outdated(step: Step, error: ClusterError) -> bool:
    """Whether a step was planned from an older state: an object is another than was read, or gone."""
    if isinstance(step, Apply):
        return error.stale and "resourceVersion" in step.object["metadata"]
    return error.stale or error.status == 404
