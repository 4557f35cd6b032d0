"""The controls of the level baseline of the Pod Security Standards: what leads from a pod to its node."""

from collections.abc import Iterator, Mapping
from typing import Any

from kvasir_operator.pod_validation.containers import PROBES
from kvasir_operator.pod_validation.path import Path, Problem, shown

CONTAINER_LISTS = ("containers", "initContainers", "ephemeralContainers")
CAPABILITIES = frozenset(
    {
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
)
SECCOMP = ("RuntimeDefault", "Localhost")
_SYSCTLS = frozenset(
    {
        "kernel.shm_rmid_forced",
        "net.ipv4.ip_local_port_range",
        "net.ipv4.ip_local_reserved_ports",
        "net.ipv4.ip_unprivileged_port_start",
        "net.ipv4.ping_group_range",
        "net.ipv4.tcp_fin_timeout",
        "net.ipv4.tcp_keepalive_intvl",
        "net.ipv4.tcp_keepalive_probes",
        "net.ipv4.tcp_keepalive_time",
        "net.ipv4.tcp_syncookies",
    }
)
_SELINUX_TYPES = ("", "container_t", "container_init_t", "container_kvm_t", "container_engine_t")
_APPARMOR = ("RuntimeDefault", "Localhost")
_APPARMOR_ANNOTATION = "container.apparmor.security.beta.kubernetes.io/"

Fields = Mapping[str, Any]


def containers(spec: Fields) -> Iterator[tuple[Path, Fields]]:
    """All containers of a pod: ordinary, init and ephemeral ones, with their paths."""
    for field in CONTAINER_LISTS:
        for index, container in enumerate(spec.get(field) or []):
            yield ("spec", field, index), container


def security_context(item: Fields) -> Fields:
    """The securityContext of a pod's spec or of a container, which may be absent."""
    found: Fields = item.get("securityContext") or {}
    return found


def baseline_problems(template: Fields) -> Iterator[Problem]:
    """What the level baseline refuses, by its field."""
    spec = template["spec"]
    yield from _annotations((template.get("metadata") or {}).get("annotations") or {})
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(field):
            yield Problem(("spec", field), "must be false")
    for index, volume in enumerate(spec.get("volumes") or []):
        if volume.get("hostPath") is not None:
            yield Problem(("spec", "volumes", index, "hostPath"), "must be absent")
    yield from _sysctls(security_context(spec))
    yield from _context(security_context(spec), ("spec", "securityContext"))
    for path, container in containers(spec):
        yield from _context(security_context(container), (*path, "securityContext"))
        yield from _container(security_context(container), (*path, "securityContext"))
        yield from _host_ports(container, path)
        yield from _hosts(container, path)


def _annotations(annotations: Fields) -> Iterator[Problem]:
    for key, value in annotations.items():
        if key.startswith(_APPARMOR_ANNOTATION) and not (
            value in ("", "runtime/default") or value.startswith("localhost/")
        ):
            where = ("metadata", "annotations", key)
            yield Problem(where, f"must be runtime/default or localhost/..., is {shown(value)}")


def _sysctls(context: Fields) -> Iterator[Problem]:
    for index, sysctl in enumerate(context.get("sysctls") or []):
        if sysctl["name"] not in _SYSCTLS:
            where = ("spec", "securityContext", "sysctls", index, "name")
            yield Problem(where, f"must be one of {', '.join(sorted(_SYSCTLS))}, is {shown(sysctl['name'])}")


def _context(context: Fields, path: Path) -> Iterator[Problem]:
    """What a pod and a container may say both."""
    if (context.get("windowsOptions") or {}).get("hostProcess"):
        yield Problem((*path, "windowsOptions", "hostProcess"), "must be false")
    linux = context.get("seLinuxOptions") or {}
    if (kind := linux.get("type") or "") not in _SELINUX_TYPES:
        said = ", ".join(filter(None, _SELINUX_TYPES))
        yield Problem((*path, "seLinuxOptions", "type"), f"must be absent or one of {said}, is {shown(kind)}")
    for field in ("user", "role"):
        if linux.get(field):
            yield Problem((*path, "seLinuxOptions", field), "must be absent")
    for field, allowed in (("appArmorProfile", _APPARMOR), ("seccompProfile", SECCOMP)):
        profile = context.get(field)
        if profile is not None and profile.get("type") not in allowed:
            yield Problem(
                (*path, field, "type"), f"must be {' or '.join(allowed)}, is {shown(profile.get('type'))}"
            )


def _container(context: Fields, path: Path) -> Iterator[Problem]:
    if context.get("privileged"):
        yield Problem((*path, "privileged"), "must be false")
    for index, name in enumerate((context.get("capabilities") or {}).get("add") or []):
        if name not in CAPABILITIES:
            yield Problem((*path, "capabilities", "add", index), f"may not add {shown(name)}")
    if (mount := context.get("procMount")) not in (None, "Default"):
        yield Problem((*path, "procMount"), f"must be Default, is {shown(mount)}")


def _host_ports(container: Fields, path: Path) -> Iterator[Problem]:
    for index, port in enumerate(container.get("ports") or []):
        if port.get("hostPort"):
            yield Problem((*path, "ports", index, "hostPort"), f"must be absent, is {port['hostPort']}")


def _hosts(container: Fields, path: Path) -> Iterator[Problem]:
    """Probes and hooks that the kubelet would send elsewhere than to the pod."""
    hooks = container.get("lifecycle") or {}
    handlers = [((*path, kind), container.get(kind)) for kind in PROBES]
    handlers += [((*path, "lifecycle", kind), hooks.get(kind)) for kind in ("postStart", "preStop")]
    for where, handler in handlers:
        for kind in ("httpGet", "tcpSocket"):
            if ((handler or {}).get(kind) or {}).get("host"):
                yield Problem((*where, kind, "host"), "must be absent")
