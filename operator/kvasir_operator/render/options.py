"""What rendering needs besides the spec."""

import msgspec

from kvasir_operator.pod_validation import RESTRICTED, PodPolicy


class PodWatch(msgspec.Struct, frozen=True):
    """The router finds workers by watching the pods of its namespace."""


class StaticWorkers(msgspec.Struct, frozen=True):
    """The router gets its workers' URLs (`http://host:port`) as flags, and needs no API server."""

    urls: tuple[str, ...]


Discovery = PodWatch | StaticWorkers


class Issuer(msgspec.Struct, frozen=True):
    """Who signs pods' certificates by cert-manager: an Issuer of each service's namespace, or a ClusterIssuer."""

    name: str
    kind: str = "Issuer"
    group: str = "cert-manager.io"

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


CERTIFICATES = 3
ENTRYPOINT = 4
DEFAULTS = ENTRYPOINT
"""What pods are given by default, as a number that grows with each change that would roll them: a service keeps the
one that it was made with (`plan/release.py`). 2: limits of memory, requests of ephemeral storage. 3: certificates,
and routers that follow pods to their InferenceService. 4: the image's entry point, whose first process is tini."""


class Options(msgspec.Struct, frozen=True):
    """`engine_image` runs every data-plane pod. `discovery`: how the router finds workers.

    `operator_namespace` and `metrics_namespace`: where the operator runs and where what scrapes metrics runs, which
    NetworkPolicies then let in. `pod_monitors`: whether PodMonitors are made beside the scrape annotations.
    `defaults`: which defaults pods have.
    `issuer`: who signs pods' certificates; `None`: the operator itself.
    `operator_class`: of which services this operator is. `operator`: who it is, as NAMESPACE/LEASE; empty: nobody
    asks. `template_policy`: what the installer lets pods be, which admission judges.
    """

    engine_image: str = "kvasir-engine:latest"
    defaults: int = DEFAULTS
    discovery: Discovery = PodWatch()
    operator_namespace: str = ""
    metrics_namespace: str = ""
    pod_monitors: bool = True
    issuer: Issuer | None = None
    operator_class: str = ""
    operator: str = ""
    template_policy: PodPolicy = RESTRICTED

    @property
    def in_cluster(self) -> bool:
        """Whether the pods run in a cluster, which has accounts, policies and budgets, or as plain processes."""
        return isinstance(self.discovery, PodWatch)
