"""Runs a function in a process of its own, which has the engine imported but not Triton."""

import multiprocessing as mp
import os
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any


def _run(pipe: Connection, environment: Mapping[str, str], function: str, arguments: tuple[Any, ...]) -> None:
    os.environ.clear()  # it is that of whichever test came first
    os.environ.update(environment)
    module, _, name = function.rpartition(".")
    try:
        pipe.send((True, getattr(__import__(module), name)(*arguments)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))


def forked(function: str, *arguments: Any, **environment: str) -> Any:
    """What `module.function` of this folder returns; these variables are set before its module is imported."""
    context = mp.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_run, args=(theirs, {**os.environ, **environment}, function, arguments), daemon=True
    )
    process.start()
    theirs.close()
    try:
        well, said = ours.recv()
    except EOFError:
        process.join()
        raise AssertionError(f"{function} ended with status {process.exitcode}") from None
    process.join()
    assert well, said
    return said


def in_interpreter(function: str) -> None:
    """Run `module.function` in Triton's interpreter, which Triton takes at its import."""
    forked(function, TRITON_INTERPRET="1")
