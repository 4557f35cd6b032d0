"""Executes a Dockerfile's steps in a root directory, with chroot and an overlay for each stage; root, on Linux.

Steps use this machine's network, name servers, apt mirrors and pip settings. These are seen below /mnt while a step
runs, and no stage keeps anything of them.
"""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from build_context import make_context
from dockerfile import Copy, MakeFolder, Run, Stage, stages
from e2e.controlplane import build

#: Of this machine, seen by steps: nothing is at this path in an image.
MACHINE = "/mnt/machine"
_PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
_AUTHORITIES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")


class ImageError(Exception):
    """A step failed; the message names its line and ends with what it said."""


@dataclass(frozen=True)
class Layers:
    """A root directory: what was written, over what was there. `lowers`: the topmost first."""

    upper: Path
    lowers: tuple[Path, ...]

    @property
    def work(self) -> Path:
        """What an overlay needs beside its upper folder."""
        return self.upper.with_name("work")

    def options(self, writable: bool) -> str:
        """Of the overlay's mount."""
        if writable:
            return f"lowerdir={':'.join(map(str, self.lowers))},upperdir={self.upper},workdir={self.work}"
        return f"lowerdir={':'.join(map(str, (self.upper, *self.lowers)))}"


@dataclass(frozen=True)
class Image:
    """A built image: its last stage and where its files are."""

    stage: Stage
    layers: Layers
    seconds: float


def unavailable() -> str | None:
    """Why no image can be built here, or `None`."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "a Dockerfile's steps are run as root, on Linux"
    if missing := [name for name in ("unshare", "chroot", "nsenter", "apt-get", "dpkg") if not shutil.which(name)]:
        return f"needs {', '.join(missing)}"
    probe = "d=$(mktemp -d); mount -t tmpfs t $d && mkdir $d/l $d/u $d/w $d/m && " + (
        "mount -t overlay o -o lowerdir=$d/l,upperdir=$d/u,workdir=$d/w $d/m; r=$?; umount -l $d; rmdir $d; exit $r"
    )
    done = subprocess.run([*_ALONE, "sh", "-c", probe], capture_output=True, text=True, check=False)
    return f"overlays cannot be mounted here: {done.stderr.strip()}" if done.returncode else None


_ALONE = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private")


def build_image(repository: Path, dockerfile: str, base: Path, folder: Path, arguments: Mapping[str, str]) -> Image:
    """Build the last stage of a Dockerfile. `base` stands for every image that a FROM names. Raises ImageError."""
    from base_image import ENVIRONMENT

    begin = time.monotonic()
    context = folder / "context"
    context.mkdir(parents=True)
    make_context(repository, context)
    made: dict[str, Layers] = {}
    found = stages((repository / dockerfile).read_text(), arguments, ENVIRONMENT)
    for number, stage in enumerate(found):
        below = made.get(stage.base)
        lowers = (below.upper, *below.lowers) if below else (base,)
        layers = Layers(folder / f"stage-{number}" / "upper", lowers)
        for path in (layers.upper, layers.work):
            path.mkdir(parents=True)
        builder = _Builder(layers, folder / f"stage-{number}", context, made)
        for step in stage.steps:
            builder.do(step)
        made[stage.name or str(number)] = layers
    return Image(found[-1], layers, time.monotonic() - begin)


class _Builder:
    def __init__(self, layers: Layers, folder: Path, context: Path, made: Mapping[str, Layers]) -> None:
        self._layers, self._folder, self._context, self._made = layers, folder, context, made
        self._root, self._source = folder / "root", folder / "source"
        for path in (self._root, self._source):
            path.mkdir()

    def do(self, step: Run | Copy | MakeFolder) -> None:
        """One step. Raises ImageError."""
        if isinstance(step, Run):
            self._run(step)
        elif isinstance(step, Copy):
            self._copy(step)
        else:
            self._script(f"mkdir -p {shlex.quote(f'{self._root}{step.path}')}", f"WORKDIR {step.path}")

    def _run(self, step: Run) -> None:
        root = shlex.quote(str(self._root))
        lines = [
            f"mount -t proc proc {root}/proc",
            f"mount --rbind /dev {root}/dev",
            f"mount --bind /etc/resolv.conf {root}/etc/resolv.conf",
            f"mount --bind /etc/hosts {root}/etc/hosts",
            f"mount -t tmpfs tmpfs {root}/mnt",
            f"mkdir {root}{MACHINE}",
        ]
        settings = machine_settings()
        for name in settings.folders:
            lines += [
                f"mkdir -p {root}{MACHINE}{name}",
                f"mount --bind {name} {root}{MACHINE}{name}",
                f"mount -o remount,bind,ro {root}{MACHINE}{name}",
            ]
        lines.append(f"printf %s {shlex.quote(settings.apt_sources)} > {root}/mnt/sources.list")
        lines.append(f"printf %s {shlex.quote(settings.apt)} > {root}/mnt/apt.conf")
        environment = {
            "HOME": "/root",
            "DEBIAN_FRONTEND": "noninteractive",
            "APT_CONFIG": "/mnt/apt.conf",
            "DPKG_FORCE": "unsafe-io",
            **settings.environment,
            **step.environment,
        }
        assigned = " ".join(shlex.quote(f"{name}={value}") for name, value in environment.items())
        command = f"cd {shlex.quote(step.directory)} && exec /bin/sh -c {shlex.quote(step.command)}"
        user = "" if step.user == "0:0" else f"--userspec={step.user} "
        lines.append(f"exec chroot {user}{root} env -i {assigned} /bin/sh -c {shlex.quote(command)}")
        self._script("\n".join(lines), f"line {step.line}: RUN {step.command[:200]}")

    def _copy(self, step: Copy) -> None:
        root, lines = str(self._root), []
        source = self._context
        if step.stage:
            source = self._source
            options = self._made[step.stage].options(writable=False)
            lines.append(f"mount -t overlay source -o {shlex.quote(options)} {shlex.quote(str(source))}")
        for name in step.sources:
            path = f"{source}/{name.lstrip('/')}"
            lines.append(_copied(path, f"{root}{step.target}"))
        self._script("\n".join(lines), f"line {step.line}: COPY {' '.join(step.sources)}")

    def _script(self, lines: str, what: str) -> None:
        overlay = (
            f"mount -t overlay root -o {shlex.quote(self._layers.options(True))} {shlex.quote(str(self._root))}"
        )
        done = subprocess.run(
            ["nice", "-n", "10", *_ALONE, "sh", "-eu", "-c", f"{overlay}\n{lines}"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise ImageError(f"{what}: ended with {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}")


def _copied(source: str, target: str) -> str:
    """As COPY does it: a folder's contents, or a file, into the target; owned by root, modes kept."""
    copy, where, into = "cp -a --no-preserve=ownership", shlex.quote(source), shlex.quote(target)
    parent = shlex.quote(os.path.dirname(target.rstrip("/")))
    file = (
        f"mkdir -p {into}; {copy} {where} {into}"
        if target.endswith("/")
        else (f"mkdir -p {parent}; {copy} -T {where} {into}")
    )
    return f"if test -d {where}; then mkdir -p {into}; {copy} -T {where} {into}; else {file}; fi"


@dataclass(frozen=True)
class MachineSettings:
    """How this machine reaches packages, as a step sees it."""

    environment: Mapping[str, str]
    apt: str
    apt_sources: str
    folders: tuple[str, ...]


@cache
def machine_settings() -> MachineSettings:
    """apt's mirrors and proxies, pip's settings, proxies and certificate authorities."""
    settings = {name: os.environ[name] for name in (*_PROXIES, *_AUTHORITIES) if os.environ.get(name)}
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        name = "PIP_" + key.rpartition(".")[2].upper().replace("-", "_")
        settings[name] = " ".join(str(ast.literal_eval(value)).split())
    environment, folders = _moved(settings)
    proxies = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=True).stdout
    apt = [line for line in proxies.splitlines() if re.match(r"Acquire::https?::Proxy ", line, re.IGNORECASE)]
    apt += ['Dir::Etc::SourceList "/mnt/sources.list";', 'Dir::Etc::SourceParts "/mnt/none";']
    apt.append('Acquire::Retries "3";')
    sources = "".join(f"deb {mirror} bookworm main\n" for mirror in build.mirrors()[:1])
    return MachineSettings(environment, "\n".join(apt) + "\n", sources, folders)


def _moved(settings: Mapping[str, str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """The settings with this machine's paths as they are below MACHINE, and the folders to be seen there."""
    folders: set[str] = set()

    def word(each: str) -> str:
        path = each.removeprefix("file://")
        if not path.startswith("/") or not Path(path).exists():
            return each
        folders.add("/" + path.split("/")[1])
        return each[: len(each) - len(path)] + MACHINE + path

    moved = {name: " ".join(word(each) for each in value.split(" ")) for name, value in settings.items()}
    return moved, tuple(sorted(folders))


def machine_texts() -> Sequence[str]:
    """Texts that no image may hold: this machine's paths as steps see them, and where its packages come from."""
    words = [word for value in machine_settings().environment.values() for word in value.split()]
    urls = [word for word in (*words, *build.mirrors()) if word.startswith(("http://", "https://"))]
    return (MACHINE, *(url for url in urls if "//deb.debian.org/" not in url and "//pypi.org/" not in url))
