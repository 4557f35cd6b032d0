"""A pod's spec as types. Fields that `PodRunner` does not support are refused by name.

Fields that only a kernel or a scheduler can enforce (resources, securityContext, affinity, tolerations) are not
read. Fields without which the pod would behave differently are refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Object = Mapping[str, Any]
RestartPolicy = Literal["Always", "OnFailure", "Never"]

_REFUSED_POD = ("initContainers", "ephemeralContainers", "shareProcessNamespace")
_REFUSED_CONTAINER = ("volumeDevices", "restartPolicy")


class PodError(Exception):
    """The pod cannot run here. The message names the field."""


@dataclass(frozen=True)
class HttpGet:
    """GET `scheme://host:port/path`; 200 to 399 is success. `host` "" is the pod's IP."""

    port: int
    path: str = "/"
    scheme: str = "http"
    host: str = ""
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class TcpSocket:
    """Success when the port accepts a connection."""

    port: int
    host: str = ""


@dataclass(frozen=True)
class Exec:
    """Success when the command, run beside the container, exits with 0."""

    command: tuple[str, ...]


@dataclass(frozen=True)
class Sleep:
    """A preStop hook that only waits."""

    seconds: float


@dataclass(frozen=True)
class Probe:
    """A probe with Kubernetes' defaults, times in seconds."""

    action: HttpGet | TcpSocket | Exec
    initial_delay: float = 0.0
    period: float = 10.0
    timeout: float = 1.0
    success_threshold: int = 1
    failure_threshold: int = 3
    grace: float | None = None


@dataclass(frozen=True)
class Container:
    """One container. `command` () is the image's entrypoint; env, args and mounts are still unresolved."""

    name: str
    image: str
    command: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    working_dir: str = ""
    env: tuple[Object, ...] = ()
    env_from: tuple[Object, ...] = ()
    mounts: tuple[Object, ...] = ()
    ports: Mapping[str, int] = field(default_factory=dict)
    startup: Probe | None = None
    readiness: Probe | None = None
    liveness: Probe | None = None
    pre_stop: HttpGet | TcpSocket | Exec | Sleep | None = None


@dataclass(frozen=True)
class Pod:
    """One pod, parsed. `grace` is terminationGracePeriodSeconds."""

    name: str
    namespace: str
    uid: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    containers: tuple[Container, ...]
    volumes: Mapping[str, Object]
    restart_policy: RestartPolicy = "Always"
    grace: float = 30.0
    node_name: str = ""
    service_account: str = "default"


def _port(value: Any, ports: Mapping[str, int], where: str) -> int:
    if isinstance(value, str) and not value.isdigit():
        if value not in ports:
            raise PodError(f"{where}: the container has no port named {value!r}")
        return ports[value]
    return int(value)


def _action(handler: Object, ports: Mapping[str, int], where: str) -> HttpGet | TcpSocket | Exec:
    if get := handler.get("httpGet"):
        headers = tuple((h["name"], h["value"]) for h in get.get("httpHeaders") or ())
        path = get.get("path") or "/"
        return HttpGet(
            port=_port(get["port"], ports, f"{where}.httpGet.port"),
            path=path if path.startswith("/") else f"/{path}",
            scheme=(get.get("scheme") or "HTTP").lower(),
            host=get.get("host") or "",
            headers=headers,
        )
    if tcp := handler.get("tcpSocket"):
        return TcpSocket(_port(tcp["port"], ports, f"{where}.tcpSocket.port"), tcp.get("host") or "")
    if run := handler.get("exec"):
        return Exec(tuple(run["command"]))
    raise PodError(f"{where}: only httpGet, tcpSocket and exec can be run here")


def _probe(container: Object, kind: str, ports: Mapping[str, int], where: str) -> Probe | None:
    spec = container.get(kind)
    if not spec:
        return None
    # A value of 0 means the default for these, as in the API server's own defaulting.
    grace = spec.get("terminationGracePeriodSeconds")
    return Probe(
        action=_action(spec, ports, f"{where}.{kind}"),
        initial_delay=float(spec.get("initialDelaySeconds") or 0),
        period=float(spec.get("periodSeconds") or 10),
        timeout=float(spec.get("timeoutSeconds") or 1),
        success_threshold=int(spec.get("successThreshold") or 1),
        failure_threshold=int(spec.get("failureThreshold") or 3),
        grace=None if grace is None else float(grace),
    )


def _pre_stop(spec: Object, ports: Mapping[str, int], where: str) -> HttpGet | TcpSocket | Exec | Sleep | None:
    lifecycle = spec.get("lifecycle") or {}
    if lifecycle.get("postStart"):
        raise PodError(f"{where}.lifecycle.postStart cannot be run here")
    hook = lifecycle.get("preStop")
    if not hook:
        return None
    if "sleep" in hook:
        return Sleep(float(hook["sleep"]["seconds"]))
    return _action(hook, ports, f"{where}.lifecycle.preStop")


def _container(spec: Object, where: str) -> Container:
    for key in _REFUSED_CONTAINER:
        if spec.get(key):
            raise PodError(f"{where}.{key} is not supported by a pod of processes")
    ports = {p["name"]: int(p["containerPort"]) for p in spec.get("ports") or () if p.get("name")}
    return Container(
        name=spec["name"],
        image=spec.get("image") or "",
        command=tuple(spec.get("command") or ()),
        args=tuple(spec.get("args") or ()),
        working_dir=spec.get("workingDir") or "",
        env=tuple(spec.get("env") or ()),
        env_from=tuple(spec.get("envFrom") or ()),
        mounts=tuple(spec.get("volumeMounts") or ()),
        ports=ports,
        startup=_probe(spec, "startupProbe", ports, where),
        readiness=_probe(spec, "readinessProbe", ports, where),
        liveness=_probe(spec, "livenessProbe", ports, where),
        pre_stop=_pre_stop(spec, ports, where),
    )


def parse(pod: Object) -> Pod:
    """The pod as types. Raises PodError for what a pod of processes does not support."""
    meta, spec = pod["metadata"], pod["spec"]
    for key in _REFUSED_POD:
        if spec.get(key):
            raise PodError(f"spec.{key} is not supported by a pod of processes")
    containers: Sequence[Object] = spec.get("containers") or ()
    if not containers:
        raise PodError("spec.containers is empty")
    policy: RestartPolicy = spec.get("restartPolicy") or "Always"
    if policy not in ("Always", "OnFailure", "Never"):
        raise PodError(f"spec.restartPolicy: {policy!r} is not one of Always, OnFailure, Never")
    grace = spec.get("terminationGracePeriodSeconds")
    return Pod(
        name=meta["name"],
        namespace=meta.get("namespace") or "default",
        uid=meta.get("uid") or "",
        labels=dict(meta.get("labels") or {}),
        annotations=dict(meta.get("annotations") or {}),
        containers=tuple(_container(c, f"spec.containers[{i}]") for i, c in enumerate(containers)),
        volumes={v["name"]: v for v in spec.get("volumes") or ()},
        restart_policy=policy,
        grace=30.0 if grace is None else float(grace),
        node_name=spec.get("nodeName") or "",
        service_account=spec.get("serviceAccountName") or "default",
    )
