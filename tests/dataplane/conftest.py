"""Stacks of real workers, one a dtype: each takes half a minute of a core to start, and 5 GB."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from stack import Stack, running


@pytest.fixture(scope="package")
def float32(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running(tmp_path_factory.mktemp("float32"), "float32") as stack:
        yield stack


@pytest.fixture(scope="package")
def bfloat16(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running(tmp_path_factory.mktemp("bfloat16"), "bfloat16") as stack:
        yield stack
