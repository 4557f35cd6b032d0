"""Compiled kernels are pickles and machine code: a file that others could write is never loaded."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

LOAD = "from kvasir_engine.cpu_kernels import team\ndef one(arguments):\n    pass\nprint(hex(team.kernel(one)))\n"


class Payload:
    """What a replaced pickle does when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


# Runs scripts in forks, so that torch and numba are imported once. Nothing of Kvasir is, before a fork.
FORKING = """
import json, os, runpy, sys, traceback
import numba, torch

for line in sys.stdin:
    script, environment, log = json.loads(line)
    pid = os.fork()
    if pid == 0:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, 1), os.dup2(file, 2)
        os.environ.clear()
        os.environ.update(environment)
        code = 1
        try:
            runpy.run_path(script, run_name="__main__")
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@dataclass
class Outcome:
    """Of a script: its exit status, and all that it printed."""

    returncode: int
    stderr: str


Load = Callable[..., Outcome]


@pytest.fixture(scope="module")
def load() -> Iterator[Load]:
    """Compile a kernel in a process of its own, with these variables."""
    with subprocess.Popen(
        [sys.executable, "-c", FORKING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as forking:

        def load(script: Path, **env: str) -> Outcome:
            script.write_text(LOAD)
            log = script.with_suffix(".log")
            assert forking.stdin is not None
            assert forking.stdout is not None
            forking.stdin.write(json.dumps([str(script), {**os.environ, **env}, str(log)]) + "\n")
            forking.stdin.flush()
            return Outcome(int(forking.stdout.readline()), log.read_text())

        yield load


def indexes(folder: Path) -> list[Path]:
    return [*folder.rglob("*.nbi")]


def test_a_pickle_in_the_shared_cache_is_not_read(load: Load, tmp_path: Path) -> None:
    shared, run, mark, script = (tmp_path / name for name in ("shared", "run", "ran", "one.py"))
    env = {"KVASIR_CACHE": str(shared), "KVASIR_RUN_DIR": str(run)}
    first = load(script, **env)
    assert first.returncode == 0, first.stderr
    (index,) = indexes(run)
    assert indexes(shared) == []
    # Wherever an index lay, and with the names that it had before: now in the claim that others write.
    for place in (shared / "kernels" / index.relative_to(run / "kernels"), shared / index.relative_to(run)):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(pickle.dumps(Payload(mark)))
    assert load(script, **env).returncode == 0
    assert not mark.exists()
    # The attack is one: in the folder that is read it runs.
    index.write_bytes(pickle.dumps(Payload(mark)))
    load(script, **env)
    assert mark.exists()


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o750, 0o1777])
@pytest.mark.parametrize("variable", ["KVASIR_RUN_DIR", "NUMBA_CACHE_DIR"])
def test_a_folder_that_others_reach_is_refused_in_one_line(
    load: Load, tmp_path: Path, mode: int, variable: str
) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(mode)
    found = load(tmp_path / "one.py", **{"KVASIR_RUN_DIR": str(tmp_path / "run"), variable: str(folder)})
    assert found.returncode
    assert f"{folder} has mode {mode:04o}, not 0700" in found.stderr.splitlines()[-1]
    assert indexes(tmp_path) == []


def test_a_link_to_a_folder_of_others_is_refused(load: Load, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "there")
    found = load(tmp_path / "one.py", KVASIR_RUN_DIR=str(tmp_path / "link"))
    assert "is not a folder of its own" in found.stderr.splitlines()[-1]


def test_a_server_ends_with_one_line_before_it_loads_anything(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    found = subprocess.run(
        [
            *(sys.executable, "-c", "from kvasir_engine.entrypoints.main import main; main()"),
            *("worker", "--role", "both", "--model", "file:///nowhere", "--host", "127.0.0.1", "--port", "0"),
        ],
        env={**os.environ, "KVASIR_RUN_DIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == 2
    (line,) = found.stderr.splitlines()
    assert line == (
        f"kvasir: error: {folder} has mode 0777, not 0700: others could replace what this process trusts; "
        "remove it or mend it"
    )
