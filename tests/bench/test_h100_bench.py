"""bench/h100.sh without an H100: its parts work on a tiny shape, and one that fails costs its own figures only."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bench import h100, h100_parts
from rich.console import Console

from kvasir_engine.protocol import Delta, Failure

ROOT = Path(__file__).parents[2]


def test_lengths_are_skewed_and_have_the_mean_asked_for() -> None:
    drawn = h100_parts.lengths(1000, 220, 4096, random.Random(0))
    assert sum(drawn) / 1000 == pytest.approx(220, rel=0.01)
    assert sorted(drawn)[500] < 180
    assert min(drawn) >= 1
    assert max(h100_parts.lengths(1000, 220, 300, random.Random(0))) == 300


def test_a_stream_with_a_failure_or_a_wrong_token_is_an_error() -> None:
    streams = {"a": h100_parts.Stream()}
    assert not h100_parts.take(streams, Delta("a", 0, [5]), 1.0)
    assert not h100_parts.take(streams, Delta("a", 0, [5], finish="handoff"), 2.0)  # as decode says it again
    assert h100_parts.take(streams, Delta("a", 1, [6], finish="length"), 3.0)
    assert (streams["a"].tokens, streams["a"].times) == ([5, 6], [1.0, 3.0])
    with pytest.raises(RuntimeError, match="another one the second time"):
        h100_parts.take(streams, Delta("a", 1, [7]), 4.0)
    with pytest.raises(RuntimeError, match="or is missing"):
        h100_parts.take(streams, Delta("a", 3, [7]), 4.0)
    with pytest.raises(RuntimeError, match="overloaded: no"):
        h100_parts.take(streams, Delta("a", failure=Failure("overloaded", "no")), 4.0)


def test_the_engines_part_measures_a_tiny_model(tmp_path: Path) -> None:
    h100.make_model(tmp_path / "model", h100.DRY)
    figures = h100_parts.engine(tmp_path / "model", h100.DRY)
    assert figures["requests"] == 12
    assert figures["output_tokens"] > 0
    for name in h100.YARDSTICKS:
        assert figures[name] > 0
    console = Console(width=120, record=True)
    h100.show(console, {"machine": h100.machine(), "parts": {"engine": figures}, "seconds": 1.0, "dry": True})
    assert "16,215 (SGLang, published)" in console.export_text()


def test_graphs_are_measured_beside_none_in_the_same_run(tmp_path: Path) -> None:
    h100.make_model(tmp_path / "model", h100.DRY)
    figures = h100_parts.eager(tmp_path / "model", h100.DRY)
    assert figures["graph_steps"] == 0  # on a CPU there are none in either part
    parts = {
        "engine": {"graph_steps": 0, "single_tokens_per_second": 30.0, "batch_tokens_per_second": 90.0},
        "eager": figures,
    }
    h100.beside_eager(parts)
    assert "graphs_over_eager_single" not in figures
    parts["engine"]["graph_steps"] = 7
    h100.beside_eager(parts)
    assert figures["graphs_over_eager_single"] * figures["single_tokens_per_second"] == pytest.approx(30.0)
    assert figures["graphs_over_eager_batch"] * figures["batch_tokens_per_second"] == pytest.approx(90.0)
    failed: dict[str, Any] = {"engine": {"failed": "so"}, "eager": {"single_tokens_per_second": 5.0}}
    h100.beside_eager(failed)
    assert list(failed["eager"]) == ["single_tokens_per_second"]


def test_the_rate_of_a_batch_counts_what_all_of_it_decodes() -> None:
    assert h100_parts.decode_rate([[0.0, 1.0, 2.0, 3.0]]) == 1.0
    assert h100_parts.decode_rate([[0.0, 1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0]]) == 2.0


def test_a_part_that_fails_says_why_and_one_that_hangs_is_stopped(tmp_path: Path) -> None:
    failed = h100.run_part("engine", tmp_path / "nothing", tmp_path, True, 120)
    assert "nothing" in failed["failed"]
    assert h100.run_part("engine", tmp_path, tmp_path, True, 0.01) == {"failed": "not done within 0 s"}


def test_the_tests_marked_cuda_are_found_and_need_none_of_the_projects_plugins() -> None:
    command = h100.gpu_tests()
    assert str(ROOT / "tests" / "model" / "test_cuda.py") in command
    found = subprocess.run([*command, "--collect-only"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    assert "test_on_a_gpu_flashinfer_attends_as_torch_does_in_float32" in found.stdout


@pytest.mark.soak
def test_the_whole_command_runs_dry_and_writes_its_figures(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "bench" / "h100.sh"), "--dry", "--out", str(tmp_path)]
    done = subprocess.run(
        command, env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "h100.json").read_text())
    assert list(results["parts"]) == ["model", "engine", "eager", "pair", "tests"]
    pair = results["parts"]["pair"]
    page = 16 * 2 * 2 * 16 * 4  # tokens, K and V, KV heads, head size, bytes: of a layer
    assert pair["gigabytes_moved"] * 1e9 == (2 + h100.DRY.pair_requests + 1) * 3 * page * 2
    assert "SGLang" in done.stdout
