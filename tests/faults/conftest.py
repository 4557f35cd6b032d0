"""A cluster of real processes, whose undisturbed part lives as long as the module; and the simulation's parts."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

for folder in (Path(__file__).parent, Path(__file__).parents[1] / "core"):
    sys.path.insert(0, str(folder))

from cluster import Cluster  # noqa: E402 - found by the lines above
from questions import Reference, make_model  # noqa: E402


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """A small random model, and what it answers when nothing is disturbed."""
    folder = tmp_path_factory.mktemp("small-model")
    make_model(folder)
    return Reference(folder)


@pytest.fixture(scope="module")
def cluster(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Places for two of each kind of process; none is started."""
    cluster = Cluster(reference.folder, tmp_path_factory.mktemp("logs"))
    yield cluster
    cluster.close()
