"""A worker computes with the cores that are its own."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvasir_engine.executor.threads import own_cores, use_own_cores
from kvasir_engine.thread_wait_policy import PASSIVE, let_threads_sleep


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "20000 100000\n"}, 1),
        ({"cpu.max": "3200000 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu.max": "what\n"}, 8),
    ],
)
def test_the_cgroups_quota_bounds_the_threads(files: dict[str, str], cores: int, tmp_path: Path) -> None:
    for name, content in files.items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(content)
    assert own_cores(8, tmp_path) == cores


@pytest.mark.parametrize(
    ("device", "driver", "gpu"),
    [("cuda", False, True), ("auto", True, True), ("auto", False, False), ("cpu", True, False)],
)
def test_threads_sleep_where_a_gpu_computes_and_what_the_user_set_stays(
    device: str, driver: bool, gpu: bool, tmp_path: Path
) -> None:
    file = tmp_path / "nvidiactl"
    if driver:
        file.touch()
    environment: dict[str, str] = {}
    assert let_threads_sleep(device, environment, file) == gpu
    assert environment == (PASSIVE if gpu else {})
    own = {"OMP_WAIT_POLICY": "ACTIVE"}
    let_threads_sleep(device, own, file)
    assert own["OMP_WAIT_POLICY"] == "ACTIVE"


def test_it_is_said_before_torch_is_imported() -> None:
    """A worker for a GPU that is not there: by the time it says so, OpenMP has read the environment."""
    script = (
        "import sys, os\n"
        "import kvasir_engine.entrypoints.cli\n"
        "assert 'torch' not in sys.modules\n"
        "seen = []\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch': seen.append(os.environ.get('OMP_WAIT_POLICY'))\n"
        "sys.meta_path.insert(0, Finder())\n"
        "sys.argv = ['kvasir', 'worker', '--model', 'file:///nowhere', '--role', 'decode', '--device', 'cuda']\n"
        "try: kvasir_engine.entrypoints.cli.main()\n"
        "except SystemExit: pass\n"
        "print(seen)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "['PASSIVE']", done.stderr


def test_a_gpus_worker_computes_on_the_host_with_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    try:
        assert use_own_cores(1, "cuda") == 1
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        torch.set_num_threads(3)
        assert use_own_cores(1, "cuda") == 3
    finally:
        torch.set_num_threads(before)
