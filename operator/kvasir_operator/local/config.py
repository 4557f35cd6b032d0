"""The configuration of a run. Its supervisor gets it from a call or from a pipe."""

import os
from pathlib import Path

import msgspec

from kvasir_operator.local import fetch
from kvasir_operator.pods import ENGINE


class EngineCommands(msgspec.Struct, frozen=True):
    """The programs of a run. `command` replaces the image's `kvasir`; `fetch`, with URI and revision, gets the
    model."""

    command: tuple[str, ...]
    fetch: tuple[str, ...]


def this_engine() -> EngineCommands:
    """The engine that is installed with this module."""
    return EngineCommands(ENGINE.entrypoint, fetch.COMMAND)


class RunConfig(msgspec.Struct, frozen=True):
    """One run. `manifest` is the manifest's text, `source` its name in errors. `name` "" stands for the
    InferenceService's name.

    `timeout`: seconds from the end of the model's download to Ready, 0 for no limit.
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
