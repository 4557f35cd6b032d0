"""bench/gpu: what a GPU machine without a package registry is brought, and what it runs there."""

import json
import re
import subprocess
import sys
from pathlib import Path

from bench.gpu import http_load, nixl_raw, parity, tokenizer

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
