"""Loading leaves no pool of threads behind."""

import os
import subprocess
import sys

import pytest

COUNT = """
import os, sys, time, torch
from kvasir_engine.executor.threads import apart

def work():
    x = torch.ones(2_000_000)
    return float((x + x).sum()) / 2

torch.set_num_threads(2)
before = len(os.listdir("/proc/self/task"))
assert (apart(work) if sys.argv[1] == "apart" else work()) == 2_000_000
deadline = time.monotonic() + (60 if sys.argv[1] == "apart" else 0)
while (left := len(os.listdir("/proc/self/task")) - before) and time.monotonic() < deadline:
    time.sleep(0.01)  # threads that were let go end when they get to it
print(left)
"""


@pytest.mark.parametrize(("where", "left"), [("apart", 0), ("here", 1)])
def test_the_pool_of_threads_goes_with_the_thread_that_computed(where: str, left: int) -> None:
    environ = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", COUNT, where], env=environ, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == left
