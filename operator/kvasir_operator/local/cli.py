"""The commands of a local run: `kvasir up | status | logs | down | render`."""

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Annotated, Literal

import typer

# The commands import what they need themselves: `kvasir worker` starts through the same program.

File = Annotated[str, typer.Option("-f", "--filename", help="Manifest with the InferenceService; - is stdin.")]
Name = Annotated[str | None, typer.Option("--name", help="Name of the run. Default: the only one.")]

_POLL_SECONDS = 0.1
_FILE_WIDTH = 200


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command()(up)
    app.command()(status)
    app.command()(logs)
    app.command()(down)
    app.command()(render)


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn a LocalError into one line and its exit status."""
    from kvasir_operator.local.errors import LocalError

    try:
        yield
    except LocalError as error:
        typer.echo(f"kvasir: error: {error}", err=True)
        raise typer.Exit(error.status) from None


def _claims(claims: list[str]) -> dict[str, str]:
    from kvasir_operator.local.errors import LocalError

    found: dict[str, str] = {}
    for claim in claims:
        name, separator, path = claim.partition("=")
        if not (name and separator and path):
            raise LocalError(f"--claim {claim}: expected NAME=PATH")
        found[name] = path
    return found


def up(
    file: File,
    port: Annotated[int, typer.Option(help="Port of the endpoint on 127.0.0.1; 0 takes a free one.")] = 8000,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return when ready and run on.")] = False,
    name: Annotated[str, typer.Option(help="Name of the run. Default: the InferenceService's.")] = "",
    claim: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="Folder for a PersistentVolumeClaim.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Most seconds from model to ready; 0: no limit.")] = 0.0,
) -> None:
    """Run an InferenceService as processes of this machine."""
    import asyncio

    from kvasir_operator.api import NAME_PATTERN
    from kvasir_operator.local import addresses, config, detached, events, machine, manifest, state
    from kvasir_operator.local.errors import LocalError
    from kvasir_operator.local.supervisor import LocalSupervisor
    from kvasir_operator.local.view import Terminal, View

    with _one_line_errors():
        text = manifest.read(file)
        claims = _claims(claim or [])
        # Checked here too, so that a mistake is told before anything is started or written.
        read = manifest.load(text, file)
        machine.check(read, machine.detect(claims))
        run_name = name or read.service.name
        if not re.fullmatch(NAME_PATTERN, run_name):
            raise LocalError(f"--name {run_name}: must be lower-case letters, digits and dashes")
        if state.load(run_name) is not None:
            raise state.already_running(run_name)
        addresses.bind_endpoint(port).close()
    wanted = config.RunConfig(text, file, port, config.this_engine(), run_name, claims, timeout)
    view = View(Terminal(highlight=False), logs=not detach)
    failed: list[events.Failed] = []

    def report(event: events.Any) -> None:
        view(event)
        if isinstance(event, events.Failed):
            failed.append(event)

    async def supervise() -> int:
        return await LocalSupervisor(wanted, report).run()

    try:
        code = detached.start(wanted, run_name, report) if detach else asyncio.run(supervise())
    finally:
        view.close()
    for failure in failed:
        typer.echo(f"kvasir: error: {failure.reason}", err=True)
    raise typer.Exit(code)


def status(
    name: Name = None,
    output: Annotated[
        Literal["table", "json"], typer.Option("-o", "--output", help="Form of the answer.")
    ] = "table",
) -> None:
    """Show a run's endpoint and pods."""
    import msgspec

    from kvasir_operator.local import state

    with _one_line_errors():
        run = state.find(name)
    if output == "json":
        typer.echo(msgspec.json.format(msgspec.json.encode(run)).decode())
        return
    from rich.console import Console

    from kvasir_operator.local.view import sizes, table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    word = "ready" if run.ready else "not ready"
    console.print(f"{run.name}  {run.url}  {word}  {sizes(run)}".rstrip(), soft_wrap=True)
    console.print(table(run))


def logs(
    pod: Annotated[str, typer.Argument(help="A pod's name, or a part that only one pod's name has.")],
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Wait for more.")] = False,
    name: Name = None,
) -> None:
    """Print a pod's log."""
    from kvasir_operator.local import state
    from kvasir_operator.local.errors import LocalError

    with _one_line_errors():
        path = _log(pod, name)
        run = state.find(name) if follow else None
        try:
            file = path.open("rb")
        except OSError as error:
            raise LocalError(f"{path}: {error.strerror}", status=1) from None
    with file:
        _copy(file)
        while run is not None and state.alive(run):
            time.sleep(_POLL_SECONDS)
            _copy(file)
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_ino != os.fstat(file.fileno()).st_ino:
                    file.close()
                    file = path.open("rb")


def down(
    name: Name = None,
    force: Annotated[bool, typer.Option("--force", help="Kill instead of letting requests finish.")] = False,
) -> None:
    """Stop a run and wait until it is gone."""
    from kvasir_operator.local import state

    with _one_line_errors():
        run = state.find(name)
    with contextlib.suppress(ProcessLookupError):
        os.kill(run.supervisor, signal.SIGTERM)
        while state.alive(run):
            if force:
                os.kill(run.supervisor, signal.SIGTERM)
            time.sleep(_POLL_SECONDS)
    typer.echo(f"{run.name} is down")


def render(
    file: File,
    image: Annotated[str, typer.Option(help="The engine's image.")] = "",
    operator_namespace: Annotated[
        str, typer.Option(help="Where the operator runs, which NetworkPolicies let in.")
    ] = "kvasir-system",
    metrics_namespace: Annotated[
        str, typer.Option(help="Where metrics are collected, which NetworkPolicies let in. Default: nobody is.")
    ] = "",
    pod_monitors: Annotated[
        bool, typer.Option("--pod-monitors", help="With the PodMonitors that the Prometheus operator reads.")
    ] = False,
    template_policy: Annotated[
        Literal["restricted", "baseline", "privileged"],
        typer.Option(
            help="The level of the Pod Security Standards that pods may have: the chart's templatePolicy."
        ),
    ] = "restricted",
    rdma: Annotated[
        bool, typer.Option(help="Let pods with transfer.rdmaResource have IPC_LOCK: the chart's allowRdma.")
    ] = True,
) -> None:
    """Print the objects that the operator would apply for a manifest's InferenceServices."""
    import yaml

    from kvasir_operator.local import manifest
    from kvasir_operator.pod_validation import PodPolicy
    from kvasir_operator.render import Options
    from kvasir_operator.render import render as render_objects

    with _one_line_errors():
        services, others = manifest.services_of(manifest.read(file), file, PodPolicy(template_policy, rdma))
    for other in others:
        typer.echo(f"kvasir: note: {other} is the manifest's own and not printed", err=True)
    # Whether a cluster has the Prometheus operator is not known here; without it a PodMonitor could not be applied.
    options = Options(
        engine_image=image or Options().engine_image,
        operator_namespace=operator_namespace,
        metrics_namespace=metrics_namespace,
        pod_monitors=pod_monitors,
    )
    objects = [item for service in services for item in render_objects(service, options)]
    typer.echo(yaml.safe_dump_all(objects, sort_keys=False), nl=False)


def _log(pod: str, name: str | None) -> Path:
    """The log file of the pod `pod`, also of a run that has ended. Raises LocalError."""
    from kvasir_operator.local import state
    from kvasir_operator.local.errors import LocalError

    root = state.root()
    runs = [name] if name is not None else [run.name for run in state.running()] or ["*"]
    files = sorted(file for run in runs for file in root.glob(f"{run}/pods/*/*.log"))
    exact = [file for file in files if file.parent.name == pod]
    found = exact or [file for file in files if pod in file.parent.name]
    if len(found) == 1:
        return found[0]
    if not found:
        known = ", ".join(file.parent.name for file in files) or "none"
        raise LocalError(f"no pod {pod}; pods with a log: {known}", status=1)
    raise LocalError(f"{pod} could be {', '.join(file.parent.name for file in found)}")


def _copy(file: IO[bytes]) -> None:
    """Copy the rest of the file to standard output."""
    while data := file.read(1 << 16):
        sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
