"""A container's command line and environment, resolved as a kubelet does."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from kvasir_operator.pods.host import Host
from kvasir_operator.pods.podspec import Container, Object, Pod, PodError
from kvasir_operator.pods.volumes import Mounts

_REFERENCE = re.compile(r"\$(?:\$|\(([^()]*)\))")
_MAP_FIELD = re.compile(r"^metadata\.(labels|annotations)\['([^']+)'\]$")


@dataclass(frozen=True)
class Launch:
    """What a container executes: its command line, its whole environment and its working directory."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    cwd: str | None = None


def expand(text: str, values: Mapping[str, str]) -> str:
    """`$(NAME)` replaced by its value; `$$` is a `$`; a reference to an unknown name stays as written."""

    def one(match: re.Match[str]) -> str:
        if match.group() == "$$":
            return "$"
        return values.get(match.group(1), match.group())

    return _REFERENCE.sub(one, text)


def field_value(path: str, pod: Pod, ip: str, host: Host) -> str:
    """The downward API's value for a `fieldRef.fieldPath`. Raises PodError for a field it does not have."""
    if match := _MAP_FIELD.match(path):
        source = pod.labels if match.group(1) == "labels" else pod.annotations
        return source.get(match.group(2), "")
    fields = {
        "metadata.name": pod.name,
        "metadata.namespace": pod.namespace,
        "metadata.uid": pod.uid,
        "spec.nodeName": pod.node_name or host.node_name,
        "spec.serviceAccountName": pod.service_account,
        "status.podIP": ip,
        "status.podIPs": ip,
        "status.hostIP": host.host_ip,
    }
    if path not in fields:
        raise PodError(f"fieldRef {path!r} is not supported")
    return fields[path]


def _keyed(kind: str, ref: Object, known: Mapping[str, Mapping[str, bytes]], where: str) -> str | None:
    name, key = ref["name"], ref["key"]
    if key in known.get(name, {}):
        return known[name][key].decode()
    if ref.get("optional"):
        return None
    missing = f"couldn't find key {key!r} in {kind} {name!r}" if name in known else f"{kind} {name!r} not found"
    raise PodError(f"{where}: {missing}")


def _source(entry: Object, pod: Pod, ip: str, host: Host, where: str) -> str | None:
    source = entry["valueFrom"]
    if ref := source.get("fieldRef"):
        return field_value(ref["fieldPath"], pod, ip, host)
    if ref := source.get("secretKeyRef"):
        return _keyed("secret", ref, host.secrets, where)
    if ref := source.get("configMapKeyRef"):
        return _keyed("config map", ref, host.config_maps, where)
    raise PodError(f"{where}: valueFrom.{next(iter(source), '')} is not supported")


def _from_whole(entry: Object, host: Host, where: str) -> dict[str, str]:
    """The variables of an `envFrom` entry: all keys of a Secret or ConfigMap."""
    for key, kind, known in (
        ("secretRef", "secret", host.secrets),
        ("configMapRef", "config map", host.config_maps),
    ):
        if ref := entry.get(key):
            if ref["name"] not in known and not ref.get("optional"):
                raise PodError(f"{where}: {kind} {ref['name']!r} not found")
            prefix = entry.get("prefix") or ""
            return {prefix + k: v.decode() for k, v in known.get(ref["name"], {}).items()}
    raise PodError(f"{where}: neither secretRef nor configMapRef")


def _env(container: Container, pod: Pod, ip: str, host: Host) -> dict[str, str]:
    values: dict[str, str] = {}
    for entry in container.env_from:
        values |= _from_whole(entry, host, f"container {container.name!r}: envFrom")
    for entry in container.env:
        name = entry["name"]
        if "valueFrom" in entry:
            found = _source(entry, pod, ip, host, f"container {container.name!r}: env {name}")
            if found is not None:
                values[name] = found
        else:
            values[name] = expand(entry.get("value") or "", values)
    return values


def resolve(
    container: Container, pod: Pod, ip: str, host: Host, mounts: Mounts, prefix: tuple[str, ...] = ()
) -> Launch:
    """The container as a command of this machine. Raises PodError, naming what cannot be resolved."""
    image = host.image(container.image)
    own = _env(container, pod, ip, host)
    command = host.command(container.image, [mounts.rewrite(expand(part, own)) for part in container.command])
    if not command:
        raise PodError(f"container {container.name!r}: image {container.image!r} has no command on this machine")
    args = [mounts.rewrite(expand(part, own)) for part in container.args]
    env = {
        **host.environ,
        **(image.env if image else {}),
        "HOSTNAME": pod.name,
        **{name: mounts.rewrite(value) for name, value in own.items()},
    }
    cwd = mounts.rewrite(container.working_dir) or None
    return Launch((*prefix, *command, *args), env, cwd)
