"""Forks `kvasir` processes that need not import torch and transformers again: they start in a tenth of the time.

A script: each line of standard input is a JSON object {argv, environment, log}; each line of standard output is the
pid of the process that was forked for it. Nothing of Kvasir is imported before the fork. Children die with it.
"""

import ctypes
import json
import os
import signal
import sys

import fastapi  # noqa: F401
import httpx  # noqa: F401
import llvmlite.binding  # noqa: F401
import numba.extending  # noqa: F401
import openai  # noqa: F401
import prometheus_client  # noqa: F401
import torch
import transformers
import typer  # noqa: F401
import uvicorn  # noqa: F401
import websockets.asyncio.client
import websockets.asyncio.server  # noqa: F401
from transformers import LlamaConfig, PreTrainedTokenizerFast  # noqa: F401

PR_SET_PDEATHSIG = 1
libc = ctypes.CDLL(None)


def run_child(argv: list[str], environment: dict[str, str], log: str) -> None:
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    nothing, out = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for source, target in ((nothing, 0), (out, 1), (out, 2)):
        os.dup2(source, target)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = argv
    torch.set_num_threads(1)
    from kvasir_engine.entrypoints.cli import main

    main()


if __name__ == "__main__":
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries them
    assert transformers.__version__
    while line := sys.stdin.readline():
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                run_child(**order)
                code = 0
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 1
            finally:
                sys.stderr.flush()
                os._exit(code)
        print(pid, flush=True)
