"""FlashInfer's modules compiled ahead: which, and where FlashInfer finds them; a stand-in compiles."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvasir_engine.attention import flashinfer_backend, flashinfer_modules
from kvasir_engine.attention.flashinfer_choice import prefill_backend
from kvasir_engine.executor import kernels_ahead


class Spec:
    """As FlashInfer's JitSpec: compiled below `jit`, at hand below `aot`."""

    def __init__(self, root: Path, *how: Any) -> None:
        self.name = "-".join(str(each) for each in (how[0], how[1], how[5], how[8]))
        self._aot = root / "aot" / self.name / f"{self.name}.so"
        self.jit_library_path = root / "jit" / f"{self.name}.so"

    @property
    def is_aot(self) -> bool:
        return self._aot.exists()

    def build(self, verbose: bool) -> None:
        assert not self.jit_library_path.exists(), "compiled twice"
        self.jit_library_path.parent.mkdir(parents=True, exist_ok=True)
        self.jit_library_path.write_text(self.name)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    modules = {
        "flashinfer.prefill": SimpleNamespace(_gen_batch_prefill_primary_module=lambda *how: Spec(tmp_path, *how)),
        "flashinfer.jit.env": SimpleNamespace(FLASHINFER_AOT_DIR=tmp_path / "aot"),
    }
    monkeypatch.setattr(flashinfer_modules.importlib, "import_module", modules.__getitem__)
    return tmp_path


def test_all_that_the_backend_takes_is_compiled_where_flashinfer_looks_and_only_once(library: Path) -> None:
    for _ in range(2):
        kernels_ahead.main(["flashinfer"])
    assert len(list((library / "aot").glob("*/*.so"))) == 12
    for dim in flashinfer_backend.HEAD_DIMS:
        for dtype in flashinfer_backend.DTYPES:
            at_hand, lacking = flashinfer_modules.compiled_in(dim, dtype, {False, True})
            assert len(at_hand) == 2
            assert not lacking


def test_what_was_not_compiled_ahead_is_named(library: Path) -> None:
    flashinfer_modules.compile_into(library / "aot", [64], [torch.bfloat16])
    at_hand, lacking = flashinfer_modules.compiled_in(128, torch.bfloat16, {True})
    assert (at_hand, lacking) == ([], ["fa2-torch.bfloat16-128-True"])
    assert flashinfer_modules.compiled_in(64, torch.bfloat16, {True}) == (["fa2-torch.bfloat16-64-True"], [])


def test_fa3_is_there_when_all_of_it_was_compiled_ahead(library: Path) -> None:
    assert not flashinfer_modules.has_fa3(64, torch.bfloat16, {False})
    flashinfer_modules.compile_into(library / "aot", [64], [torch.bfloat16], ["fa3"])
    assert flashinfer_modules.has_fa3(64, torch.bfloat16, {False, True})
    assert not flashinfer_modules.has_fa3(128, torch.bfloat16, {False})
    assert not flashinfer_modules.compiled_in(64, torch.bfloat16, {False})[0], "FA2 is another module"
    kernels_ahead.main(["fa3"])
    assert flashinfer_modules.has_fa3(128, torch.float16, {True})


def test_a_release_with_other_names_has_no_fa3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashinfer_modules.importlib, "import_module", lambda name: SimpleNamespace())
    assert not flashinfer_modules.has_fa3(64, torch.bfloat16, {False})


@pytest.mark.parametrize(
    ("capability", "head_dim", "there", "chosen"),
    [
        ((9, 0), 128, True, "fa3"),
        ((9, 0), 256, True, "fa3"),
        ((9, 0), 128, False, "fa2"),
        ((9, 0), 96, True, "fa2"),
        ((8, 0), 128, True, "fa2"),
        ((10, 0), 128, True, "fa2"),
        ((12, 0), 64, True, "fa2"),
    ],
)
def test_prompts_are_fa3s_on_hopper_gpus_where_it_is_compiled_in(
    capability: tuple[int, int], head_dim: int, there: bool, chosen: str
) -> None:
    assert prefill_backend(capability, head_dim, there) == chosen


def test_a_command_that_names_nothing_to_compile_says_what_there_is() -> None:
    with pytest.raises(SystemExit, match=r"triton\|flashinfer"):
        kernels_ahead.main([])
