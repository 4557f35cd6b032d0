"""What the images install, by version and hash: `make locks` writes locks/ by asking pip what it would install.

One file an image. Versions are those of constraints.txt, where that names the package; what only CUDA builds
need is as it resolves, and stays so by the lock. Hashes are those of the files for the image's Python, on x86-64 and, for
the operator, on arm64 too. torch for CPUs is PyTorch's own build, which is not on PyPI: its lock names the index.
"""

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "locks"
TORCH_CPU = "https://download.pytorch.org/whl/cpu"
_HEAD = "# Written by `make locks`: what {what} installs, with `pip install --require-hashes`.\n"


@dataclass(frozen=True)
class Lock:
    """`extras`: of pyproject.toml. `python` and `glibc`: the base image's. `index`: where torch for CPUs is."""

    name: str
    what: str
    extras: tuple[str, ...]
    python: str
    glibc: int
    machines: tuple[str, ...] = ("x86_64",)
    index: str = ""


LOCKS = (
    Lock("operator", "the operator's image", ("operator",), "3.11", 36, ("x86_64", "aarch64")),
    Lock("engine-cuda", "the engine's image for GPUs", ("engine", "cuda"), "3.12", 39),
    Lock("engine", "the engine's image for CPUs", ("engine",), "3.11", 36, index=TORCH_CPU),
)


def requirements(lock: Lock) -> list[str]:
    """What the image asks for by name."""
    described = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, build = described["project"], described["build-system"]["requires"]
    wanted = [*project["dependencies"], *build, *([f"torch=={torch_version()}+cpu"] if lock.index else [])]
    return [*wanted, *(each for extra in lock.extras for each in project["optional-dependencies"][extra])]


def torch_version() -> str:
    """That of constraints.txt."""
    (found,) = re.findall(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.M)
    return str(found)


def resolved(lock: Lock, machine: str) -> list[dict[str, Any]]:
    """What pip would install there. Raises CalledProcessError.

    The build for CPUs may be at hand (PIP_FIND_LINKS): its index is asked where it is not.
    """
    try:
        return _resolved(lock, machine, "")
    except subprocess.CalledProcessError:
        if not lock.index:
            raise
        return _resolved(lock, machine, lock.index)


def _resolved(lock: Lock, machine: str, index: str) -> list[dict[str, Any]]:
    old = {"x86_64": ["manylinux1", "manylinux2010", "manylinux2014"], "aarch64": ["manylinux2014"]}[machine]
    tags = [*old, *(f"manylinux_2_{minor}" for minor in range(5, lock.glibc + 1)), "linux"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        words = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed"]
        words += ["--only-binary=:all:", "--python-version", lock.python, "--target", f"{folder}/none"]
        words += [word for tag in tags for word in ("--platform", f"{tag}_{machine}")]
        words += ["--report", str(report), "-c", str(ROOT / "constraints.txt"), *requirements(lock)]
        if index:
            words += ["--extra-index-url", index]
        subprocess.run(words, check=True)
        found: list[dict[str, Any]] = json.loads(report.read_text())["install"]
    return found


def page(lock: Lock) -> str:
    """The lock's text."""
    hashes: dict[tuple[str, str], set[str]] = {}
    for machine in lock.machines:
        for each in resolved(lock, machine):
            name = re.sub(r"[-_.]+", "-", each["metadata"]["name"]).lower()
            key = name, each["metadata"]["version"]
            hashes.setdefault(key, set()).add(each["download_info"]["archive_info"]["hashes"]["sha256"])
    lines = [
        f"{name}=={version} " + " ".join(f"--hash=sha256:{each}" for each in sorted(found))
        for (name, version), found in sorted(hashes.items())
    ]
    index = f"--extra-index-url {lock.index}\n" if lock.index else ""
    return _HEAD.format(what=lock.what) + index + "\n".join(lines) + "\n"


if __name__ == "__main__":
    chosen = sys.argv[1:]
    FOLDER.mkdir(exist_ok=True)
    for one in LOCKS:
        if not chosen or one.name in chosen:
            (FOLDER / f"{one.name}.txt").write_text(page(one))
