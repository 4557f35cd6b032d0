"""Lets the tests here import the certificates, the services, the stand and the toy model; what most share."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "core"))
sys.path.insert(0, str(Path(__file__).parents[1] / "wire"))
sys.path.insert(0, str(Path(__file__).parent))

from services import Service, WorkerProcess, make_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Service]:
    """An InferenceService with its own CA."""
    service = Service(tmp_path_factory.mktemp("service"), model)
    yield service
    service.close()


@pytest.fixture(scope="session")
def pair(service: Service) -> tuple[WorkerProcess, WorkerProcess]:
    """A prefill and a decode worker with certificates."""
    return service.worker("prefill"), service.worker("decode")
