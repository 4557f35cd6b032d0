"""Both images, each built when it is first asked for, and a volume for them."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from base_image import base_image
from e2e.controlplane import binaries
from image_build import Image, build_image, unavailable
from test_dockerfiles import CPU

from kvasir_operator.render.pod import USER_ID

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
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
            print(f"{name}: built in {made[name].seconds:.0f} s")
        return made[name]

    yield image
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """A cache volume as a kubelet gives it to a pod with an fsGroup, with the tiny model."""
    from e2e import tiny  # and with it torch, which no other test here needs

    tiny.make()
    folder = tmp_path / "volume"
    shutil.copytree(binaries.cache() / "e2e-tiny", folder / "e2e-tiny")
    for path in (folder, *folder.rglob("*")):
        os.chown(path, 0, USER_ID)
        path.chmod(0o2775 if path.is_dir() else 0o664)
    return folder
