"""hf:// through the hub's real client, against a hub on loopback."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import COMMIT, serve_hub
from tiny_models import llama

from kvasir_engine.model.models.registry import load_config

RESOLVE = """
import json, sys
from pathlib import Path
from kvasir_engine.errors import ModelError
from kvasir_engine.model.loading.resolver import resolve
heard = []
try:
    weights = sys.argv[3] == "weights"
    folder = resolve(sys.argv[1], cache=Path(sys.argv[2]), progress=lambda *s: heard.append(s), weights=weights)
    print(json.dumps([str(folder), heard]))
except ModelError as error:
    print(json.dumps([f"ModelError: {error}", heard]))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    folder = tmp_path / "repo"
    llama().save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"not wanted")
    with serve_hub("org/name", "main", folder) as serving:
        yield serving


def resolve_in_a_process(uri: str, cache: Path, endpoint: str, what: str = "weights") -> tuple[str, list[Any]]:
    """In a process of its own: the client reads its endpoint when it is imported."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_ETAG_TIMEOUT": "2"}
    environment.pop("HF_TOKEN", None)
    shown = subprocess.run(
        [sys.executable, "-c", RESOLVE, uri, str(cache), what], capture_output=True, text=True, env=environment
    )
    assert shown.returncode == 0, shown.stderr
    result, heard = json.loads(shown.stdout)
    return result, heard


def test_a_hub_model_is_downloaded_once_and_then_needs_no_hub(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    endpoint, asked = hub
    first, heard = resolve_in_a_process("hf://org/name", tmp_path / "cache", endpoint)
    assert Path(first).name == COMMIT
    assert load_config(Path(first)).layers == 3
    assert {stage for stage, _, _ in heard} == {"download"}
    size = (Path(first) / "model.safetensors").stat().st_size
    assert max(done for _, done, _ in heard) >= size
    assert not any("pytorch_model" in path for path in asked)
    asked.clear()
    again, heard = resolve_in_a_process("hf://org/name", tmp_path / "cache", endpoint)
    assert (again, heard, asked) == (first, [], [])


def test_a_router_leaves_the_weights_on_the_hub(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    endpoint, asked = hub
    folder, _ = resolve_in_a_process("hf://org/name", tmp_path / "cache", endpoint, "tokenizer")
    assert load_config(Path(folder)).layers == 3
    assert not any("safetensors" in path for path in asked)
    folder, _ = resolve_in_a_process("hf://org/name", tmp_path / "cache", endpoint, "weights")
    assert (Path(folder) / "model.safetensors").exists(), "the router's note hid the weights from a worker"


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("hf://org/name@v9", "ModelError: hf://org/name has no revision v9"),
        ("hf://org/other", "ModelError: hf://org/other does not exist, or is private and HF_TOKEN is not set"),
    ],
)
def test_what_the_hub_does_not_have_is_named(
    hub: tuple[str, list[str]], tmp_path: Path, uri: str, said: str
) -> None:
    assert resolve_in_a_process(uri, tmp_path / "cache", hub[0])[0] == said


def test_an_unreachable_hub_is_one_sentence(tmp_path: Path) -> None:
    said, _ = resolve_in_a_process("hf://org/name", tmp_path, "http://127.0.0.1:1")
    assert said.startswith("ModelError: hf://org/name cannot be downloaded: ")
    assert "\n" not in said
