"""The names of pods that have a subdomain, in the hosts files of all pods: there is no name server to ask.

In a cluster `HOSTNAME.SUBDOMAIN.NAMESPACE` is a record of the headless Service called SUBDOMAIN, ready or not where
the Service publishes such addresses. Here it is there as soon as the pod has an address.
"""

import os
from pathlib import Path

from e2e.node.api import Object


class Names:
    """Keeps the hosts files of one agent's pods up to date with the pods of the cluster."""

    def __init__(self) -> None:
        self._lines: dict[str, str] = {}
        self._files: dict[Path, str] = {}

    def update(self, uid: str, pod: Object | None) -> None:
        """A pod as it is now; `None`: it is gone."""
        line = "" if pod is None else _line(pod)
        if line != self._lines.get(uid, ""):
            self._lines.pop(uid, None)
            if line:
                self._lines[uid] = line
            for path, first in self._files.items():
                self._write(path, first)

    def follow(self, path: Path) -> None:
        """From now on the hosts file has the names beside what is in it."""
        self._files[path] = path.read_text()
        self._write(path, self._files[path])

    def leave(self, path: Path) -> None:
        """The file's pod is gone."""
        self._files.pop(path, None)

    def _write(self, path: Path, first: str) -> None:
        # In place: the file is mounted, another of its name would not be.
        data = "".join([first, *self._lines.values()]).encode()
        with open(os.open(path, os.O_WRONLY), "wb", buffering=0) as file:
            file.write(data)
            file.truncate(len(data))


def _line(pod: Object) -> str:
    spec, ip = pod["spec"], pod["status"].get("podIP")
    if not ip or not spec.get("subdomain"):
        return ""
    name = f"{spec.get('hostname') or pod['metadata']['name']}.{spec['subdomain']}.{pod['metadata']['namespace']}"
    return f"{ip} {name}.svc.cluster.local {name}\n"
