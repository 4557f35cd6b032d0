"""`kvasir` with the local commands alone, the fake engine in the engine's place, and probes ten times as often."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

FAKE = (sys.executable, str(Path(__file__).with_name("fakeengine.py")))
SUPERVISE = "supervise"


def probe_often() -> None:
    from kvasir_operator.pods import podspec

    probe = podspec._probe

    def often(*args: Any) -> podspec.Probe | None:
        found = probe(*args)
        return found and dataclasses.replace(found, period=found.period / 10)

    podspec._probe = often


def fake_engine() -> None:
    from kvasir_operator.local import config, detached

    config.this_engine = lambda: config.EngineCommands(FAKE, (*FAKE, "fetch"))
    detached.COMMAND = (sys.executable, __file__, SUPERVISE)


if __name__ == "__main__":
    if sys.argv[1:] == [SUPERVISE]:
        from kvasir_operator.local import detached

        probe_often()
        sys.exit(detached.main())
    import typer

    from kvasir_operator.local import cli

    if sys.argv[1:2] == ["up"]:  # the other commands load none of what this replaces
        probe_often()
        fake_engine()
    app = typer.Typer()
    cli.register(app)
    app()
