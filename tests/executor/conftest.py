"""Lets the tests here, and the processes that they start, import `rank_workers`; and the model that all share."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from rank_workers import Greedy, Workers, make_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(folder)
    return folder


@pytest.fixture(scope="session")
def greedy(folder: Path) -> Greedy:
    return Greedy(folder)


@pytest.fixture(scope="session")
def workers(folder: Path) -> Iterator[Workers]:
    """Workers by their shape, started when first asked for."""
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    workers = Workers(folder)
    yield workers
    workers.close()
    if threads is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = threads
