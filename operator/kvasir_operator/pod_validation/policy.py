"""Judges a pod by what its installer lets pods be: the levels of Kubernetes' Pod Security Standards.

The controls are those of kubernetes.io, "Pod Security Standards", as of 1.34, without what only older versions
allow or only to pods of Windows or with a user namespace. Below `privileged`, a pod has no account but its own.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import msgspec

from kvasir_operator.pod_validation.baseline import baseline_problems
from kvasir_operator.pod_validation.path import Problem
from kvasir_operator.pod_validation.restricted import restricted_problems

Level = Literal["restricted", "baseline", "privileged"]


class PodPolicy(msgspec.Struct, frozen=True):
    """What the installer lets pods be. `level`: of the Pod Security Standards. `rdma`: whether a pod that has RDMA
    devices may lock memory, which registering it takes, also below `privileged`."""

    level: Level = "restricted"
    rdma: bool = True


RESTRICTED = PodPolicy()
UNRESTRICTED = PodPolicy("privileged")


def policy_problems(template: Mapping[str, Any], policy: PodPolicy, account: str) -> Iterator[Problem]:
    """What the policy refuses in a pod template whose types are right. `account`: the pod's own; empty: none."""
    if policy.level == "privileged":
        return
    for problem in (*baseline_problems(template), *_foreign_account(template["spec"], account)):
        yield _refused(problem, policy, "privileged")
    for problem in restricted_problems(template) if policy.level == "restricted" else ():
        yield _refused(problem, policy, "baseline")


def _refused(problem: Problem, policy: PodPolicy, needed: Level) -> Problem:
    allowed = "baseline or privileged" if needed == "baseline" else "privileged"
    why = f"the template policy is {policy.level}, more takes {allowed} (the chart's templatePolicy)"
    return Problem(problem.path, f"{problem.reason}: {why}")


def _foreign_account(spec: Mapping[str, Any], account: str) -> Iterator[Problem]:
    own = f"must be the pod's own account, {account}" if account else "must be absent, the pod has no account"
    if (spec.get("serviceAccountName") or "") != account:
        yield Problem(("spec", "serviceAccountName"), own)
    if (spec.get("serviceAccount") or account) != account:
        yield Problem(("spec", "serviceAccount"), own)
    if account:
        return
    # What follows would be the token of the namespace's default account.
    if spec.get("automountServiceAccountToken") is not False:
        yield Problem(("spec", "automountServiceAccountToken"), "must be false, the pod has no account")
    for index, volume in enumerate(spec.get("volumes") or []):
        for place, source in enumerate((volume.get("projected") or {}).get("sources") or []):
            if source.get("serviceAccountToken") is not None:
                where = ("spec", "volumes", index, "projected", "sources", place, "serviceAccountToken")
                yield Problem(where, "must be absent, the pod has no account")
