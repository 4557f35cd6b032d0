"""The configuration of a run, which its supervisor gets from a call or from a pipe."""

import os
from pathlib import Path

import msgspec

from kvasir_operator.local import fetch
from kvasir_operator.pods import ENGINE


class EngineCommands(msgspec.Struct, frozen=True):
    """The programs of a run: `command` is the image's `kvasir`, `fetch` (then URI and revision) gets the model."""

    command: tuple[str, ...]
    fetch: tuple[str, ...]


def this_engine() -> EngineCommands:
    """The engine installed beside this module."""
    return EngineCommands(ENGINE.entrypoint, fetch.COMMAND)


class RunConfig(msgspec.Struct, frozen=True):
    """One run. `manifest` is the text and `source` its name in errors; `name` "" is the InferenceService's.

    `timeout`: seconds from the model's being there to Ready, 0 for no limit.
    """

    manifest: str
    source: str
    port: int
    engine: EngineCommands
    name: str = ""
    claims: dict[str, str] = {}
    timeout: float = 0.0


def cache_folder() -> Path:
    """The model cache: `$KVASIR_CACHE`, by default `~/.cache/kvasir`."""
    return Path(os.environ.get("KVASIR_CACHE") or Path.home() / ".cache" / "kvasir").absolute()
