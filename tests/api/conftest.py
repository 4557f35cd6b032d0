"""Lets the tests here import the small models of tests/model."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_support import tiny_model
from object_server import ObjectServer, serving_objects

from kvasir_engine.api.tokenizer import ServedModel

sys.path.append(str(Path(__file__).parents[1] / "model"))


@pytest.fixture(scope="session")
def model() -> ServedModel:
    return tiny_model()


@pytest.fixture(scope="session")
def object_server() -> Iterator[ObjectServer]:
    with serving_objects() as server:
        yield server


@pytest.fixture
def bucket(object_server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of an empty bucket, which the environment lets this process use."""
    for name, value in object_server.environment().items():
        monkeypatch.setenv(name, value)
    return object_server.bucket()


@pytest.fixture(params=["folder", "object store"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path | str:
    """Where files and batches are kept."""
    if request.param == "folder":
        return tmp_path / "batches"
    address: str = request.getfixturevalue("bucket")
    return address
