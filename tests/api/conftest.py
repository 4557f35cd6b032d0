import pytest
from api_support import tiny_model

from kvasir_engine.api.tokenizer import ServedModel


@pytest.fixture(scope="session")
def model() -> ServedModel:
    return tiny_model()
