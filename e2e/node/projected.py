"""A Secret's volume as a kubelet keeps it: its files are links into a folder that is exchanged as a whole."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

_CURRENT = "..data"


def project(volume: Path, files: Mapping[str, bytes]) -> None:
    """Have `volume` show these files, all of them at once, in place of what it showed before."""
    before = volume.joinpath(os.readlink(volume / _CURRENT)) if (volume / _CURRENT).is_symlink() else None
    number = int(before.name.removeprefix("..")) + 1 if before else 1
    folder = volume / f"..{number}"
    folder.mkdir(mode=0o700)
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.write_bytes(data)
    _link(volume / _CURRENT, folder.name)
    for name in files:
        if not (volume / name).is_symlink():
            (volume / name).parent.mkdir(parents=True, exist_ok=True)
            _link(volume / name, os.path.relpath(volume / _CURRENT / name, (volume / name).parent))
    if before:
        shutil.rmtree(before)


def _link(path: Path, target: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.symlink_to(target)
    partial.replace(path)
