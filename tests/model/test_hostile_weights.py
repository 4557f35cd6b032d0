"""Weight files and indexes of a hostile author are refused by name, before a file elsewhere is opened."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from kvasir_engine.errors import ModelError
from kvasir_engine.model.config import read_json
from kvasir_engine.model.loading.safetensors_files import check_weights


def file_of(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


GOOD = file_of(json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode(), b"1234")


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/hostname", "a/../../outside.safetensors", "sub/a.safetensors", "..", ".", "",
     ".hidden.safetensors", "config.json", "a.bin"],
)  # fmt: skip
def test_an_index_names_files_of_its_folder_only(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "outside.safetensors").write_bytes(GOOD)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError, match="no safetensors file of this folder"):
        check_weights(folder)


@pytest.mark.parametrize("shown", [None, [], "a", {"a": 1}, {"a": ["b"]}, {"a": {"b": "c"}}])
def test_an_index_of_another_shape_is_refused(tmp_path: Path, shown: Any) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shown}))
    with pytest.raises(ModelError, match="weight_map names no files"):
        check_weights(tmp_path)


@pytest.mark.parametrize("nested", ["[" * 100_000, '{"a":' * 100_000, "[" * 900 + "]" * 900])
def test_what_is_nested_beyond_reason_is_an_error(tmp_path: Path, nested: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of(nested.encode()))
    with pytest.raises(ModelError, match="header cannot be read"):
        check_weights(tmp_path)
    (tmp_path / "config.json").write_text(nested)
    with pytest.raises(ModelError, match=r"cannot be read as JSON|not an object"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    "entry",
    [
        1,
        {},
        {"shape": [-1], "data_offsets": [0, 4]},
        {"shape": [1.5], "data_offsets": [0, 4]},
        {"shape": ["1"], "data_offsets": [0, 4]},
        {"shape": [10**400], "data_offsets": [0, 4]},
        {"shape": [True], "data_offsets": [0, 4]},
        {"shape": [1], "data_offsets": [0]},
        {"shape": [1], "data_offsets": [0, -4]},
        {"shape": [1], "data_offsets": "04"},
    ],
)
def test_a_header_of_other_values_is_refused(tmp_path: Path, entry: Any) -> None:
    (tmp_path / "a.safetensors").write_bytes(file_of(json.dumps({"a": entry}).encode(), b"1234"))
    with pytest.raises(ModelError, match="header cannot be read"):
        check_weights(tmp_path)


def test_a_header_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", 2**33))
        stream.truncate(2**33 + 8)  # sparse
    with pytest.raises(ModelError, match="a header of 8589934592 bytes is more than"):
        check_weights(tmp_path)
