"""`kvasir` with the local commands alone, the fake engine in the engine's place, and probes ten times as often."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import typer

from kvasir_operator.local import cli, config, detached
from kvasir_operator.pods import podspec

FAKE = (sys.executable, str(Path(__file__).with_name("fakeengine.py")))
SUPERVISE = "supervise"

probe = podspec._probe


def often(*args: Any) -> podspec.Probe | None:
    found = probe(*args)
    return found and dataclasses.replace(found, period=found.period / 10)


if __name__ == "__main__":
    podspec._probe = often
    if sys.argv[1:] == [SUPERVISE]:
        sys.exit(detached.main())
    config.this_engine = lambda: config.EngineCommands(FAKE, (*FAKE, "fetch"))
    detached.COMMAND = (sys.executable, __file__, SUPERVISE)
    app = typer.Typer()
    cli.register(app)
    app()
