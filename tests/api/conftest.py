"""Lets the tests here import the small models of tests/model."""

import sys
from pathlib import Path

import pytest
from api_support import tiny_model

from kvasir_engine.api.tokenizer import ServedModel

sys.path.append(str(Path(__file__).parents[1] / "model"))


@pytest.fixture(scope="session")
def model() -> ServedModel:
    return tiny_model()
