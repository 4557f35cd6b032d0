"""What COPY may take: the repository without what .dockerignore leaves out."""

import shutil
from fnmatch import fnmatch
from pathlib import Path


class ContextError(Exception):
    """A pattern of .dockerignore that is not understood."""


def taken(text: str) -> tuple[frozenset[str], tuple[str, ...]]:
    """The names at the root that a .dockerignore takes, and the patterns of names that it leaves out at any depth.

    Understood is the form that takes nothing but what it names: `*`, then `!NAME`, then `**/PATTERN`.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if lines[:1] != ["*"]:
        raise ContextError("the first pattern has to be *, so that nothing is taken unnamed")
    names, ignored = [], []
    for line in lines[1:]:
        if line.startswith("!") and "/" not in line and "*" not in line and not ignored:
            names.append(line[1:])
        elif line.startswith("**/") and "/" not in line[3:]:
            ignored.append(line[3:])
        else:
            raise ContextError(f"{line} is not understood")
    return frozenset(names), tuple(ignored)


def make_context(repository: Path, into: Path) -> None:
    """Copy what a builder would be sent."""
    names, ignored = taken((repository / ".dockerignore").read_text())

    def left_out(_: str, found: list[str]) -> list[str]:
        return [name for name in found if any(fnmatch(name, pattern) for pattern in ignored)]

    for name in sorted(names):
        if (repository / name).is_dir():
            shutil.copytree(repository / name, into / name, ignore=left_out, symlinks=True)
        else:
            shutil.copy2(repository / name, into / name)
