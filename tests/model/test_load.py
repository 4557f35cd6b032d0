"""Loading weights: progress, what the device and the files lack, and the pool's share of memory."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import llama, mistral

from kvasir_engine.errors import ModelError
from kvasir_engine.executor.model_runner import ModelRunner, default_kv_memory
from kvasir_engine.model.loading import weight_loader
from kvasir_engine.model.loading.weight_loader import Rows, Weights, choose_device, choose_dtype

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path)
    return tmp_path


def change(folder: Path, name: str, weight: torch.Tensor | None) -> None:
    """Replace a tensor of the model, or take it out."""
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    if weight is not None:
        tensors[name] = weight
    save_file(tensors, folder / "model.safetensors")


def test_progress_counts_up_to_the_files_bytes(folder: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    ModelRunner(folder, device="cpu", pages=1, progress=lambda *step: heard.append(step))
    assert {stage for stage, _, _ in heard} == {"load"}
    done = [done for _, done, _ in heard]
    assert done == sorted(done)
    assert (
        done[-1]
        == heard[-1][2]
        == sum(weight.nbytes for weight in load_file(folder / "model.safetensors").values())
    )


def test_a_rank_s_progress_counts_what_the_other_ranks_read(folder: Path) -> None:
    heard: list[int] = []
    weights = Weights(folder, torch.float32, CPU, lambda stage, done, total: heard.append(done), ranks=2)
    weights.tensor("model.layers.0.mlp.down_proj.weight", 48, 96, columns=range(48))
    gate_up = ("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight")
    weights.stacked([Rows(name, 96, range(48)) for name in gate_up], 48)
    assert heard == [48 * 96 * 4 * matrices for matrices in (1, 2, 3)]


def test_weights_in_several_files_load_the_same(tmp_path: Path) -> None:
    model = mistral()
    model.save_pretrained(tmp_path / "split", max_shard_size="50KB")
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 2
    ModelRunner(tmp_path / "split", device="cpu", pages=1)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    change(folder, "model.layers.1.mlp.up_proj.weight", None)
    with pytest.raises(ModelError, match=r"lacks the tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        ModelRunner(folder, device="cpu", pages=1)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder: Path) -> None:
    change(folder, "model.norm.weight", torch.ones(7))
    with pytest.raises(ModelError, match=r"model\.norm\.weight is \[7\], the configuration makes it \[48\]"):
        ModelRunner(folder, device="cpu", pages=1)


def test_quantized_weights_are_refused(folder: Path) -> None:
    change(folder, "model.layers.0.self_attn.o_proj.weight", torch.ones(48, 96, dtype=torch.int8))
    with pytest.raises(ModelError, match=r"o_proj\.weight is torch\.int8; quantized"):
        ModelRunner(folder, device="cpu", pages=1)


def test_the_pool_takes_what_it_is_given(folder: Path) -> None:
    runner = ModelRunner(folder, dtype="float16", device="cpu", page_size=8, kv_memory=100_000)
    assert runner.pool.page_bytes == 3 * 2 * 2 * 8 * 16 * 2
    assert runner.pool.pages == 100_000 // runner.pool.page_bytes
    with pytest.raises(ModelError, match="no memory for the KV pool"):
        ModelRunner(folder, device="cpu", kv_memory=1 << 50)
    assert 0 < default_kv_memory(CPU) <= 4 << 30


def test_weights_that_memory_cannot_hold_are_refused_before_they_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elements = sum(weight.numel() for weight in load_file(folder / "model.safetensors").values())
    needed = elements * 2
    monkeypatch.setattr(weight_loader, "free_memory", lambda device: needed - 1)
    heard: list[tuple[str, int, int]] = []
    said = f"no memory for the weights: {needed:,} bytes in torch.bfloat16, {needed - 1:,} free on cpu"
    with pytest.raises(ModelError, match=re.escape(said)):
        ModelRunner(folder, device="cpu", pages=1, progress=lambda *step: heard.append(step))
    assert not heard
    Weights(folder, torch.bfloat16, CPU, ranks=2)  # half of it on each rank


def test_what_needs_no_conversion_stays_in_the_file(folder: Path) -> None:
    weights = Weights(folder, torch.float32, CPU)
    own = range(2, 5)
    whole = load_file(folder / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    mapped = weights.tensor("model.layers.0.mlp.down_proj.weight", 48, 96, rows=own)
    assert torch.equal(mapped, whole[2:5])
    assert in_file(mapped, folder / "model.safetensors")
    columns = weights.tensor("model.layers.0.mlp.down_proj.weight", 48, 96, columns=own)
    assert torch.equal(columns, whole[:, 2:5])
    assert columns.is_contiguous()
    assert not in_file(columns, folder / "model.safetensors")
    assert not in_file(
        Weights(folder, torch.bfloat16, CPU).tensor("model.norm.weight", 48), folder / "model.safetensors"
    )


def in_file(weight: torch.Tensor, file: Path) -> bool:
    """Whether the tensor lies in a mapping of `file`."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(address, 16) for address in line.split()[0].split("-"))
        if begin <= weight.data_ptr() < end:
            return line.endswith(str(file))
    return False


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", 1, 2) == torch.device("cuda", 1)
    with pytest.raises(ModelError, match="tensor parallel size 4 needs as many GPUs, and 2 are visible"):
        choose_device("cuda", 1, 4)


@pytest.mark.parametrize("dtype", ["float8", "int8", ""])
def test_an_unknown_dtype_is_refused(dtype: str) -> None:
    with pytest.raises(ModelError, match="supported: auto, bfloat16, float16, float32"):
        choose_dtype(dtype, CPU)


def test_auto_is_bfloat16() -> None:
    assert choose_dtype("auto", CPU) == torch.bfloat16


def test_a_gpu_without_bfloat16_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(ModelError, match="Tesla T4 has no bfloat16; use float16"):
        choose_dtype("auto", torch.device("cuda"))
    assert choose_dtype("float16", torch.device("cuda")) == torch.float16


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    with pytest.raises(ModelError, match="device cuda is not available"):
        choose_device("cuda")
    with pytest.raises(ModelError, match="'tpu' is not known"):
        choose_device("tpu")
