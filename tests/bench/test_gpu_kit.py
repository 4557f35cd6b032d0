"""bench/gpu: what a GPU machine without a package registry is brought, and what it runs there."""

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from bench import h100
from bench.gpu import attention, http_load, nixl_raw, parity, table, tokenizer

ROOT = Path(__file__).parents[2]
KIT = ROOT / "bench" / "gpu"
IMPORTED = """
import importlib.metadata, json, sys
import bench.h100_parts, kvasir_engine.entrypoints.cli
import kvasir_engine.entrypoints.worker_server, kvasir_engine.entrypoints.build, kvasir_engine.api.http.server
import kvasir_engine.api.app, kvasir_engine.api.tokenizer, kvasir_engine.model.loading.gguf_tokenizer, gguf
import transformers
known = importlib.metadata.packages_distributions()
files = {name.split('.')[0] for name, module in list(sys.modules.items()) if getattr(module, '__file__', None)}
print(json.dumps(sorted({each for name in files for each in known.get(name, [])})))
"""


def listed(name: str) -> set[str]:
    lines = (KIT / name).read_text().splitlines()
    return {canonical(line) for line in lines if line and not line.startswith("#")}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_what_the_engine_imports_is_in_the_image_or_brought_along() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTED], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported = {canonical(name) for name in json.loads(done.stdout)}
    assert {"uvicorn", "fastapi", "msgspec", "nixl-cu13"} <= imported, (
        "the test no longer looks at the engine's door"
    )
    # What is in no constraint is nothing that ours requires: a library took it as it was there. So FastAPI does
    # with orjson, which a client in the tests requires.
    assert (imported & pinned()) - {"orjson"} - listed("image.txt") - listed("packages.txt") == set()


def pinned() -> set[str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {canonical(line.split("==")[0]) for line in lines if "==" in line}


def test_every_package_that_is_brought_has_its_version() -> None:
    assert listed("packages.txt") <= pinned()
    assert not listed("packages.txt") & listed("image.txt")


def test_answers_that_part_where_two_tokens_are_equally_likely_are_no_fault() -> None:
    right = [{"toks": ["a", "b"], "gap": [1.0, 0.1]}, {"toks": ["c"], "gap": [2.0]}]
    assert parity.compare(right, right) == 0
    near = [{"toks": ["a", "x"], "gap": [1.0, 0.1]}, right[1]]
    assert parity.compare(right, near) == 0
    assert parity.compare(right, [right[0], {"toks": ["x"], "gap": [2.0]}]) == 1
    assert len(json.loads((KIT / "parity-reference.json").read_text())) == len(parity.QUESTIONS) + len(parity.TEXTS)


def test_a_loads_summary_counts_errors_beside_answers() -> None:
    answers = [http_load.Answer(0.1, 1.1, 11, 11), http_load.Answer(0.3, 0.3, 1, 1), "503 busy"]
    found = http_load.summary(answers, 2.0)
    assert (found["requests"], found["errors"], found["error"]) == (2, 1, ["503 busy"])
    assert found["tokens_per_second"] == 6.0
    assert http_load.summary(["503"], 1.0)["errors"] == 1


def test_raw_nixl_writes_come_intact_on_a_host() -> None:
    assert nixl_raw.main("DRAM", pages=4, page=1 << 16, layers=4)


def test_the_random_models_tokenizer_encodes_and_decodes_text(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer.write(tmp_path)
    made = AutoTokenizer.from_pretrained(tmp_path)
    assert len(made) == tokenizer.TOKENS
    assert made.decode(made("héllo 1")["input_ids"]) == "héllo 1"


def test_the_scripts_are_shell_that_names_files_that_are_there() -> None:
    for script in ("pack.sh", "run.sh"):
        assert subprocess.run(["bash", "-n", str(KIT / script)]).returncode == 0
        for module in re.findall(r"-m bench\.gpu\.(\w+)", (KIT / script).read_text()):
            assert (KIT / f"{module}.py").exists()


RECORDED = Path(__file__).with_name("harvest-h200.json")


def test_the_harvest_of_a_card_becomes_a_table() -> None:
    results = json.loads(RECORDED.read_text())
    lines = table.table(results).splitlines()
    assert lines[:2] == ["| what | figures |", "| --- | --- |"]
    assert len(lines) == 2 + len(results)
    assert all(line.count("|") == 3 for line in lines)
    shown = dict(line.strip("| ").split(" | ") for line in lines[2:])
    assert "tok s 256 21,023" in shown["decode, 60 in"]
    assert "matmul TFLOPs 786" in shown["the card alone"]
    assert shown["build seconds"] == "9.6"
    assert "6.600 ms/step 53.2% x 224.0 nvjet_hsh_128x256_64x4" in shown["profile decode 256"]
    assert shown["profile decode 1"] == "left out: 3 s left"
    assert shown["profile prefill"] == "failed: RuntimeError: CUDA error: out of memory"


def test_ways_to_attend_are_measured_by_shape_and_one_that_fails_costs_its_cell() -> None:
    sys.path.append(str(ROOT / "tests" / "model"))
    import fake_flashinfer

    for shape in attention.DRY:
        cells = attention.measured(fake_flashinfer, shape, 16, "cpu", 2)
        assert len(cells) == len(attention.WAYS)
        assert [bool(cell) for cell in cells] == [way.decodes == (shape.queries == 1) for way in attention.WAYS]
        assert all(float(cell) > 0 for cell in cells if cell)

    class Broken:
        def __getattr__(self, name: str) -> None:
            raise RuntimeError(f"no {name}\nmore")

    cells = attention.measured(Broken(), attention.DRY[0], 16, "cpu", 2)
    assert cells[2] == "RuntimeError: no BatchDecodeWithPagedKVCacheWrapper"


STAND_IN = """#!/bin/sh
echo "$*" >> "$CALLS"
case "$*" in
*bench.gpu.harvest*) echo '{"decode": {"tok_s_1": 2.5}}' > "$OUT/harvest.json"; exit 3;;
*bench.h100_parts*) echo '{}' > "$OUT/pair.json";;
*bench.gpu.table*) echo table;;
*nixl_raw*) echo "NIXL DRAM fine";;
*"serve "*) exec sleep 600;;
esac
"""


def test_the_script_goes_through_all_its_steps_though_one_fails(tmp_path: Path) -> None:
    kit, out = tmp_path / "kit", tmp_path / "out"
    kit.mkdir()
    out.mkdir()
    (kit / "run.sh").write_text((KIT / "run.sh").read_text())
    with tarfile.open(kit / "kv.tgz", "w:gz") as packed:
        packed.add(KIT, "bench/gpu")
        packed.add(ROOT / "tests" / "model" / "test_cuda.py", "tests/model/test_cuda.py")
    (tmp_path / "python").write_text(STAND_IN)
    (tmp_path / "python").chmod(0o755)
    given = {"DRY": "1", "OUT": str(out), "WORK": str(tmp_path / "work"), "PYTHON": str(tmp_path / "python")}
    given |= {"CALLS": str(tmp_path / "calls"), "READY_TRIES": "1", "PORT": "1", "PATH": os.environ["PATH"]}
    done = subprocess.run(["bash", str(kit / "run.sh")], env=given, capture_output=True, text=True, timeout=120)
    steps = re.findall(r"\[\d+ s\] (\S+)", done.stdout)
    expected = ["tests:", "nixl", "model", "attention:", "harvest:", "pair:", "serve", "http", "end"]
    assert steps == expected, done.stdout + done.stderr
    assert "harvest: status 3" in done.stdout
    calls = (tmp_path / "calls").read_text()
    for wanted in ("make_model", "-m cuda --collect-only", "nixl_raw DRAM", "attention --dry", "pair", "http_load"):
        assert wanted in calls, wanted
    assert "DRY" in next(line for line in calls.splitlines() if "make_model" in line)
    given |= {"PARTS": "nixl", "CALLS": str(tmp_path / "few")}
    done = subprocess.run(["bash", str(kit / "run.sh")], env=given, capture_output=True, text=True, timeout=120)
    assert re.findall(r"\[\d+ s\] (\S+)", done.stdout) == ["nixl", "model", "end"]


@pytest.mark.soak
def test_the_harvest_runs_dry_and_measures_every_part_of_a_tiny_model(tmp_path: Path) -> None:
    h100.make_model(tmp_path / "model", h100.DRY)
    path = os.pathsep.join(str(ROOT / each) for each in ("engine", "operator", "."))
    command = [
        sys.executable,
        "-m",
        "bench.gpu.harvest",
        str(tmp_path / "model"),
        str(tmp_path / "out.json"),
        "1000",
    ]
    given = os.environ | {"HARVEST_DRY": "1", "PYTHONPATH": path}
    done = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "out.json").read_text())
    assert [name for name, part in results.items() if isinstance(part, dict) and "failed" in part] == []
    assert len(results["decode"]) == 8
    assert table.table(results)
