"""PURE: what is wanted and what there is in, the next steps out.

No step depends on what an earlier reconcile did or remembered, so a reconcile may be cut off after any step and the
next one goes on from what it then observes.
"""

from collections.abc import Sequence

from kvasir_operator.api import Rollout
from kvasir_operator.plan.difference import differs, stamped
from kvasir_operator.plan.observed import Observed, reference
from kvasir_operator.plan.preload import held
from kvasir_operator.plan.steps import Apply, Delete, ReportReplicas, Scale, Step, Wait
from kvasir_operator.plan.workers import begins, is_worker, worker_steps
from kvasir_operator.render.names import Object

__all__ = ["Apply", "Delete", "ReportReplicas", "Scale", "Step", "Wait", "plan", "stamped"]


def plan(desired: Sequence[Object], observed: Observed, limits: Rollout) -> list[Step]:
    """The steps from what is observed towards `desired`, in order; none when all is as it should be.

    `limits` bound how the workers of one revision give way to the next.
    """
    steps: list[Step] = []
    for item in map(stamped, (item for item in desired if not is_worker(item))):
        live = observed.objects.get(reference(item))
        if live is None or differs(item, live):
            steps.append(Apply(item))
    wanted = {reference(item) for item in desired}
    surplus = [r for r, item in sorted(observed.objects.items()) if r not in wanted and not is_worker(item)]
    if reason := held(desired, observed, begins(desired, observed)):
        # What serves stays as it is; a rollout or a new size begins when the model is there.
        return [*steps, *(Delete(target) for target in surplus), Wait(reason)]
    return [*steps, *(Delete(target) for target in surplus), *worker_steps(desired, observed, limits)]
