"""`kvasir drain`: asks this pod's process to drain, and returns when it may be ended.

A pod's preStop hook runs this, so it imports nothing heavy. It uses a Unix socket in a folder that only this user
can open: no browser page, mesh sidecar or other pod can connect to it.
"""

import json
import socket
import sys
from typing import Annotated

import typer

from kvasir_engine.private_folders import NotPrivate, drain_socket


def drain(
    host: Annotated[str, typer.Option(help="where the process listens", envvar="KVASIR_HOST")] = "0.0.0.0",
    port: Annotated[int, typer.Option(min=1, max=65535, envvar="KVASIR_PORT")] = 8000,
    quiet: Annotated[float, typer.Option(min=0, help="seconds without a request before it may be ended")] = 0.0,
) -> None:
    """Have the worker or router of this pod finish what it has; returns when it may be ended."""
    try:
        with socket.socket(socket.AF_UNIX) as asking:
            asking.connect(str(drain_socket(host, port)))
            asking.sendall(json.dumps({"quiet": quiet}).encode() + b"\n")
            with asking.makefile("rb") as reader:
                answer = json.loads(reader.readline(65536) or b"{}")
    except (ConnectionRefusedError, FileNotFoundError):
        return  # it does not serve yet, or not any more: nothing is in flight
    except (OSError, ValueError) as error:
        _fail(f"the process at {host}:{port} went away while it drained: {error}")
    except NotPrivate as error:
        _fail(str(error))
    if "inflight" not in answer:
        _fail(f"the process at {host}:{port} answered {answer.get('error') or 'nothing'}")


def _fail(message: str) -> None:
    sys.stderr.write(f"kvasir: error: {message}\n")
    raise typer.Exit(1) from None
