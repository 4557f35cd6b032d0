"""A command as the first process of its container, which the kernel spares what it has no handler for."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ALONE = ["unshare", "--fork", "--pid", "--kill-child"]
# Stands for a command that still imports or loads.
STARTING = """
import os, time
from kvasir_engine.entrypoints import cli, main
cli.main = lambda: (print(os.getpid(), flush=True), time.sleep(600))
main.main()
"""


def test_a_command_that_has_only_begun_ends_with_sigterm() -> None:
    if subprocess.run([*ALONE, "true"], capture_output=True, check=False).returncode:
        pytest.skip("process namespaces cannot be made here")
    with subprocess.Popen([*ALONE, sys.executable, "-c", STARTING], stdout=subprocess.PIPE, text=True) as outer:
        try:
            assert outer.stdout is not None
            assert outer.stdout.readline() == "1\n"
            (child,) = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
            os.kill(int(child), signal.SIGTERM)
            assert outer.wait(timeout=60) == 128 + signal.SIGTERM
        finally:
            outer.kill()
