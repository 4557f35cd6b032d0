"""Containers of both images, as pods start them: what they may do, how they end, and that they serve."""

import contextlib
import http.client
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from container import Container, has, running, status, wait_until
from image_build import Image

from kvasir_operator.render.pod import USER_ID

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]

MODEL = "file:///var/cache/kvasir/e2e-tiny"
CACHE = "/var/cache/kvasir"
both = pytest.mark.parametrize("name", ["operator", "engine"])


@both
def test_a_container_is_a_restricted_pods(built: Callable[[str], Image], name: str, tmp_path: Path) -> None:
    image = built(name)
    with running(image, tmp_path, argv=[*image.stage.entrypoint[:2], "sleep", "3600"]) as container:
        wait_until(container.children, "tini has started its child")
        for pid in (container.pid, *container.children()):
            assert status(pid, "Uid").split() == [str(USER_ID)] * 4
            assert int(status(pid, "CapEff"), 16) == int(status(pid, "CapBnd"), 16) == 0
            assert status(pid, "NoNewPrivs") == "1"
        assert container.inside("readlink", "/proc/1/exe").stdout == "/usr/bin/tini\n"
        assert status(container.pid, "NSpid").split()[-1] == "1"
        for path in ("/x", "/opt/kvasir/x", "/var/x", "/etc/x", f"{CACHE}/x", "/dev/x"):
            assert container.inside("touch", path).returncode, path
        assert container.inside("touch", "/tmp/x", "/dev/shm/x").returncode == 0


def test_the_operator_without_an_api_server_says_so(built: Callable[[str], Image], tmp_path: Path) -> None:
    image = built("operator")
    arguments = ("run", "--all-namespaces", "--own-namespace", "kvasir-system")
    with running(image, tmp_path, *arguments) as container:
        assert container.wait() == 2
        assert container.log_text().startswith("kvasir-operator: error: no cluster is configured")
    assert container.log_text().count("\n") == 1


def first_process_is_there(container: Container) -> bool:
    """tini's first instant: it blocks what it will hand on (and does not while it waits, its child being there)."""
    return has(container.pid, "SigBlk", signal.SIGTERM) or bool(container.children())


def program_is_there(held: Path) -> bool:
    """Python's first instant: it reads what holds it, before any line of the program's."""
    with contextlib.suppress(OSError):
        os.close(os.open(held, os.O_WRONLY | os.O_NONBLOCK))  # fails while nobody has it open to read
        return True
    return False


INSTANTS: dict[str, Callable[[Container, Path], object]] = {
    "tini's": lambda container, held: first_process_is_there(container),
    "Python's": lambda container, held: program_is_there(held),
}


@pytest.mark.parametrize("instant", INSTANTS.values(), ids=INSTANTS)
@both
def test_a_container_ends_by_a_signal_of_its_first_instant(
    built: Callable[[str], Image], name: str, instant: Callable[[Container, Path], object], tmp_path: Path
) -> None:
    """What Python imports first reads a pipe that nobody writes, so the program comes to nothing of its own."""
    folder = tmp_path / "held"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text("import os\nwhile True: os.open('/srv/pipe', os.O_RDONLY)\n")
    os.mkfifo(folder / "pipe")
    (folder / "pipe").chmod(0o644)
    held = {"PYTHONPATH": "/srv"}
    with running(built(name), tmp_path, "--help", volumes=[(folder, "/srv")], environment=held) as container:
        wait_until(lambda: instant(container, folder / "pipe"), "the instant")
        container.end()
        assert container.wait() == 128 + signal.SIGTERM


#: As long as it takes: what drains is to end by itself.
SERVING = ("--served-model-name=tiny", "--dtype=float32", "--device=cpu", "--drain-seconds=3000")
SMALL = {"KVASIR_KV_CACHE_MEMORY": "64Mi"}


def completion(tokens: int, **more: object) -> dict[str, object]:
    return {"model": "tiny", "prompt": [1, 2, 3, 4] * 40, "max_tokens": tokens, "ignore_eos": True, **more}


def test_the_engine_serves_and_drains(built: Callable[[str], Image], tmp_path: Path, volume: Path) -> None:
    image = built("engine")
    volumes = [(volume, CACHE)]
    with running(image, tmp_path, "serve", MODEL, *SERVING, volumes=volumes, environment=SMALL) as container:
        container.until_ready()
        code, text = container.request("/v1/completions", body=completion(5))
        assert code == 200
        assert json.loads(text)["usage"]["completion_tokens"] == 5
        with contextlib.closing(container.connection()) as connection:
            lines = stream(connection, completion(500, stream=True))
            assert next(lines)["choices"][0]["finish_reason"] is None
            container.end()
            assert list(lines)[-1]["choices"][0]["finish_reason"] == "length"
        assert container.wait() == 0
    # Another pod on the volume that the first one left.
    with running(image, tmp_path, "serve", MODEL, *SERVING, volumes=volumes, environment=SMALL) as container:
        container.until_ready()
        assert container.inside("kvasir", "drain").returncode == 0
        container.end()
        assert container.wait() == 0


def stream(connection: http.client.HTTPConnection, body: dict[str, object]) -> Iterator[dict[str, object]]:
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    for line in connection.getresponse():
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])


def test_a_pair_behind_a_router_serves(built: Callable[[str], Image], tmp_path: Path, volume: Path) -> None:
    """Three containers of a network: prefill hands KV to decode by NIXL and UCX as the image has them."""
    image = built("engine")
    volumes = [(volume, CACHE)]
    with contextlib.ExitStack() as all_of_them:
        found: list[Container] = []
        for port, role in ((8001, "prefill"), (8002, "decode")):
            arguments = (
                "worker",
                "--role",
                role,
                "--model",
                MODEL,
                *SERVING,
                "--fabric",
                "tcp",
                "--port",
                str(port),
            )
            network = found[0] if found else None
            started = running(image, tmp_path, *arguments, volumes=volumes, environment=SMALL, network_of=network)
            found.append(all_of_them.enter_context(started))
            found[-1].until_ready(port)
        workers = [word for port in (8001, 8002) for word in ("--worker", f"http://127.0.0.1:{port}")]
        arguments = ("router", "--model", MODEL, "--served-model-name", "tiny", *workers)
        started = running(image, tmp_path, *arguments, volumes=volumes, network_of=found[0])
        found.append(all_of_them.enter_context(started))
        found[-1].until_ready()
        code, text = found[-1].request("/v1/completions", body=completion(5))
        assert code == 200, text
        assert json.loads(text)["usage"]["completion_tokens"] == 5
        metrics = found[1].request("/metrics", 8002)[1].decode()
        (line,) = [each for each in metrics.splitlines() if each.startswith("kvasir_kv_received_tokens_total")]
        assert float(line.split()[-1]) > 0
        for container in reversed(found):
            container.end()
            assert container.wait() == 0
