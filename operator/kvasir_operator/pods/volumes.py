"""Volumes as directories of the host, to which mount paths are rewritten.

A plain process has no mount namespace, so wherever an argument or an environment value names a path at or below a
volumeMount's mountPath, the host's directory is put in its place. The path may stand alone, after `=`, `:` or `,`,
or in a `file://` URI. Paths that a program has built in cannot be rewritten; for those pass an exec prefix that
makes real mounts, and map the volume to the mount path itself.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from kvasir_operator.pods.host import Host
from kvasir_operator.pods.podspec import Container, Object, Pod, PodError

BUILT_IN = ("/dev/shm", "/tmp")


class Mounts:
    """The mount paths of one container, and their directories on the host."""

    def __init__(self, paths: Mapping[str, str]) -> None:
        self._paths = {mount.rstrip("/") or "/": host for mount, host in paths.items()}
        names = "|".join(re.escape(p) for p in sorted(self._paths, key=len, reverse=True))
        pattern = rf"(?:(?<![\w./-])|(?<=://))(?:{names})(?=$|[/:,;\s\"'])"
        self._pattern = re.compile(pattern) if self._paths else None

    def rewrite(self, text: str) -> str:
        """`text` with mount paths replaced by host directories."""
        if self._pattern is None:
            return text
        return self._pattern.sub(lambda match: self._paths[match.group()], text)


def _write_keys(directory: Path, data: Mapping[str, bytes], source: Object, where: str) -> None:
    """Write the keys of a Secret or ConfigMap as files, as a kubelet does."""
    items = source.get("items")
    wanted = {i["key"]: i["path"] for i in items} if items else {key: key for key in data}
    for key, path in wanted.items():
        if key not in data:
            if source.get("optional"):
                continue
            raise PodError(f"{where}: references non-existent key {key!r}")
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise PodError(f"{where}: {path!r} is not a path inside the volume")
        file = directory / path
        file.parent.mkdir(parents=True, exist_ok=True)
        # Owner-only from its first byte on: the data may be a secret.
        fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "wb") as out:
            out.write(data[key])


def _keyed(
    kind: str, name: str, known: Mapping[str, Mapping[str, bytes]], source: Object, directory: Path, where: str
) -> Path:
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    if name in known:
        _write_keys(directory, known[name], source, where)
    elif not source.get("optional"):
        raise PodError(f"{where}: {kind} {name!r} not found")
    return directory


def _host_path(source: Object, where: str) -> Path:
    path, kind = Path(source["path"]), source.get("type") or ""
    if kind == "DirectoryOrCreate":
        path.mkdir(parents=True, exist_ok=True)
    elif kind == "Directory" and not path.is_dir():
        raise PodError(f"{where}: hostPath {path} is not a directory")
    elif kind == "File" and not path.is_file():
        raise PodError(f"{where}: hostPath {path} is not a file")
    return path


def _volume(volume: Object, host: Host, state: Path) -> Path:
    name: str = volume["name"]
    where, directory = f"volume {name!r}", state / "volumes" / name
    if name in host.volumes:
        return host.volumes[name]
    if "emptyDir" in volume or set(volume) == {"name"}:
        directory.mkdir(parents=True, exist_ok=True)
        return directory
    if source := volume.get("hostPath"):
        return _host_path(source, where)
    if source := volume.get("secret"):
        return _keyed("secret", source["secretName"], host.secrets, source, directory, where)
    if source := volume.get("configMap"):
        return _keyed("config map", source["name"], host.config_maps, source, directory, where)
    if source := volume.get("persistentVolumeClaim"):
        if source["claimName"] in host.claims:
            return host.claims[source["claimName"]]
        raise PodError(f"{where}: persistentvolumeclaim {source['claimName']!r} not found on this machine")
    raise PodError(f"{where}: {', '.join(k for k in volume if k != 'name')} cannot be mounted on this machine")


def materialise(pod: Pod, host: Host, state: Path) -> dict[str, Path]:
    """Create the pod's mounted volumes; returns the host path of each by its name. Raises PodError."""
    mounted = {mount["name"] for container in pod.containers for mount in container.mounts}
    for name in mounted - set(pod.volumes):
        raise PodError(f"volumeMounts: no volume named {name!r}")
    return {name: _volume(pod.volumes[name], host, state) for name in sorted(mounted)}


def mounts(container: Container, pod: Pod, volumes: Mapping[str, Path]) -> Mounts:
    """The container's mount paths on the host.

    An emptyDir at /dev/shm or /tmp is not rewritten: programs have these paths built in, and a path below /tmp that
    the manifest's author wrote (of a model, say) means the machine's own.
    """
    paths: dict[str, str] = {}
    for mount in container.mounts:
        path, below = mount["mountPath"], mount.get("subPath") or ""
        if mount.get("subPathExpr"):
            raise PodError(f"container {container.name!r}: volumeMounts.subPathExpr is not supported")
        if path.rstrip("/") in BUILT_IN and "emptyDir" in pod.volumes[mount["name"]]:
            continue
        target = volumes[mount["name"]] / below if below else volumes[mount["name"]]
        if below and not target.exists():
            target.mkdir(parents=True)
        paths[path] = str(target)
    return Mounts(paths)
