"""Pod Security Standards, levels baseline and restricted (kubernetes.io, "Pod Security Standards")."""

from collections.abc import Iterator
from typing import Any

Object = dict[str, Any]

RESTRICTED_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
BASELINE_CAPABILITIES = {
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
}
SECCOMP = ("RuntimeDefault", "Localhost")


def violations(spec: Object) -> set[str]:
    """What keeps a pod out of a restricted namespace; each with the level that forbids it already."""
    return {*_pod(spec), *(found for container in _containers(spec) for found in _container(spec, container))}


def _containers(spec: Object) -> list[Object]:
    return [c for kind in ("initContainers", "containers", "ephemeralContainers") for c in spec.get(kind, [])]


def _pod(spec: Object) -> Iterator[str]:
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(field):
            yield f"baseline: {field}"
    for volume in spec.get("volumes", []):
        (kind,) = set(volume) - {"name"}
        if kind not in RESTRICTED_VOLUMES:
            yield f"{'baseline' if kind == 'hostPath' else 'restricted'}: volume {kind}"
    context = spec.get("securityContext", {})
    for field in ("sysctls", "seLinuxOptions", "windowsOptions"):
        if field in context:
            yield f"baseline: {field}"


def _container(spec: Object, container: Object) -> Iterator[str]:
    pod, own = spec.get("securityContext", {}), container.get("securityContext", {})
    if own.get("privileged"):
        yield "baseline: privileged"
    for port in container.get("ports", []):
        if port.get("hostPort"):
            yield "baseline: hostPort"
    capabilities = own.get("capabilities", {})
    added = set(capabilities.get("add", []))
    for name in added - BASELINE_CAPABILITIES:
        yield f"baseline: capability {name}"
    for name in (added & BASELINE_CAPABILITIES) - {"NET_BIND_SERVICE"}:
        yield f"restricted: capability {name}"
    if "ALL" not in capabilities.get("drop", []):
        yield "restricted: capabilities are not dropped"
    if own.get("allowPrivilegeEscalation") is not False:
        yield "restricted: privilege escalation"
    if own.get("runAsNonRoot", pod.get("runAsNonRoot")) is not True:
        yield "restricted: may run as root"
    if own.get("runAsUser", pod.get("runAsUser")) == 0:
        yield "restricted: runs as root"
    if own.get("seccompProfile", pod.get("seccompProfile", {})).get("type") not in SECCOMP:
        yield "restricted: no seccomp profile"
