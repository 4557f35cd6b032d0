"""The fields of the spec that give pods more than a level of the Pod Security Standards allows."""

import msgspec

from kvasir_operator.api import InferenceService
from kvasir_operator.api.structural_schema import Invalid
from kvasir_operator.pod_validation import PodPolicy, Problem
from kvasir_operator.render.names import Object


class PrivilegedFeature(msgspec.Struct, frozen=True):
    """A feature of the spec, and why it is refused. `rdma`: it needs no more than the memory of RDMA locked."""

    refusal: Invalid
    rdma: bool = False

    def is_allowed(self, policy: PodPolicy) -> bool:
        """Whether the policy allows it below `privileged`."""
        return self.rdma and policy.rdma


def of_feature(problem: Problem, template: Object, service: InferenceService) -> PrivilegedFeature | None:
    """The feature that causes a problem which no template does; `None` where it is none of these."""
    why = problem.reason.partition(": ")[2]
    match problem.path:
        case ("spec", "hostIPC"):
            reason = f"shm takes the node's IPC namespace (hostIPC): {why}"
            return PrivilegedFeature(Invalid("spec.transfer.fabric", reason))
        case ("spec", "volumes", int(index), "hostPath") if (
            template["spec"]["volumes"][index]["hostPath"]["path"] == service.spec.model.cache.host_path
        ):
            return PrivilegedFeature(Invalid("spec.model.cache.hostPath", f"takes a hostPath volume: {why}"))
        case (*_, "capabilities", "add", int()) if service.spec.transfer.rdma_resource:
            reason = f"takes the capability IPC_LOCK: {why}, or the chart's allowRdma"
            return PrivilegedFeature(Invalid("spec.transfer.rdmaResource", reason), rdma=True)
    return None
