"""`kvasir drain`: asks the process of this pod to leave, and returns when it may be ended.

What a pod's preStop hook runs, so it imports nothing heavy.
"""

import http.client
import sys
from typing import Annotated

import typer

_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}


def drain(
    host: Annotated[str, typer.Option(help="where the process listens", envvar="KVASIR_HOST")] = "0.0.0.0",
    port: Annotated[int, typer.Option(min=1, max=65535, envvar="KVASIR_PORT")] = 8000,
    quiet: Annotated[float, typer.Option(min=0, help="seconds without a request before it may be ended")] = 0.0,
) -> None:
    """Have the worker or router of this pod finish what it has; returns when it may be ended."""
    connection = http.client.HTTPConnection(_ANY.get(host, host), port)
    try:
        connection.request("POST", f"/drain?quiet={quiet:g}")
        answer = connection.getresponse()
        body = answer.read().decode(errors="replace")
    except ConnectionRefusedError:
        return  # it does not serve yet, or not any more: nothing is in flight
    except OSError as error:
        sys.stderr.write(f"kvasir: error: the process at {host}:{port} went away while it drained: {error}\n")
        raise typer.Exit(1) from None
    if answer.status != 200:
        sys.stderr.write(f"kvasir: error: the process at {host}:{port} answered {answer.status} {body}\n")
        raise typer.Exit(1)
