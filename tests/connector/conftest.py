"""Lets the tests here import `peer`, also in the processes that it starts."""

import sys
from pathlib import Path

import pytest

from kvasir_engine.connector import receiver

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def patient(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real writer that a busy machine holds up is not taken for silent."""
    if request.module.__name__.endswith("nixl"):
        monkeypatch.setattr(receiver, "SILENCE", 60.0)
