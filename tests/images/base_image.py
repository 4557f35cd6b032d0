"""bookworm with Python 3.11 as a folder of the cache. It stands for python:3.11-slim-bookworm, which nothing pulls.

Debian's Python is at /usr/bin and that image's at /usr/local/bin; both are found by PATH, and both are 3.11. Made
by debootstrap, which is unpacked and not installed. It is made with this machine's mirrors and names none of them.
"""

import os
import platform
import shutil
import subprocess
from pathlib import Path

from e2e.controlplane import binaries, build

SUITE = "bookworm"
#: The environment that images begin with.
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
_PACKAGES = ("ca-certificates", "python3", "python3-venv")
# As container images have it: packages and apt's own indexes are not kept.
_APT = 'APT::Keep-Downloaded-Packages "false";\nDir::Cache::pkgcache "";\nDir::Cache::srcpkgcache "";\n'
_EMPTIED = ("var/cache/apt/archives", "var/lib/apt/lists", "var/log", "var/cache/debconf")


def _make(work: Path, out: Path) -> None:
    tools = work / "tools"
    shutil.rmtree(tools, ignore_errors=True)
    build.Apt(work / "apt").unpack(["debootstrap"], tools)
    failures = []
    for mirror in build.mirrors():
        build.say(f"making {SUITE} with Python from {mirror} (one to five minutes)")
        command = [
            *("unshare", "--mount", "--propagation", "private", "nice", "-n", "10"),
            *("sh", tools / "usr/sbin/debootstrap", "--variant=minbase", f"--include={','.join(_PACKAGES)}"),
            *(f"--keyring={build.KEYRING}", SUITE, out, mirror),
        ]
        done = subprocess.run(
            [str(word) for word in command],
            env={
                **os.environ,
                "DEBOOTSTRAP_DIR": str(tools / "usr/share/debootstrap"),
                "DPKG_FORCE": "unsafe-io",  # the folder is renamed when it is whole
            },
            capture_output=True,
            text=True,
            check=False,
        )
        if not done.returncode:
            _finish(out)
            return
        failures.append((done.stdout + done.stderr)[-2000:])
    raise build.BuildError("\n".join(failures))


def _finish(root: Path) -> None:
    """Leave nothing of this machine, and what containers' file systems have."""
    for name in _EMPTIED:
        for path in (root / name).rglob("*"):
            if path.is_file() and not path.is_symlink():
                path.unlink()
    for name in ("hosts", "resolv.conf", "hostname"):
        (root / "etc" / name).unlink(missing_ok=True)
        (root / "etc" / name).write_text("")
    (root / "etc/apt/sources.list").write_text(f"deb http://deb.debian.org/debian {SUITE} main\n")
    (root / "etc/apt/apt.conf.d/90-container").write_text(_APT)


BASE = binaries.Toolset(f"image-base-{SUITE}-python311-{platform.machine()}", ("usr/bin/python3", "bin/sh"), _make)


def base_image() -> Path:
    """The root directory. Raises build.BuildError."""
    return binaries.ensure(BASE, binaries.cache())
