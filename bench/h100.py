"""One H100, one command: throughput, single-stream, prefill, idle share, CUDA graphs or not, P and D on one GPU,
and the GPU's tests.

    python -m bench.h100 [--out FOLDER] [--dry]        (bench/h100.sh installs carried wheels first)

Every part is a process of its own with a limit of time, so that one that fails or hangs costs its own figures only.
Prints one table and writes `h100.json`. With --dry: a tiny shape on the CPU.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 470.0
"""For all parts together, the model's making included."""


@dataclass(frozen=True)
class Load:
    """What is measured, and on what. Lengths in tokens."""

    device: str
    config: dict[str, Any]
    requests: int
    mean_input: int
    mean_output: int
    single_output: int
    batch: int
    prefill_prompts: int
    prefill_length: int
    pair_requests: int
    pair_input: int
    pair_output: int
    max_length: int
    max_running: int
    prefill_chunk: int
    kv_cache_memory: int
    pair_kv_cache_memory: int
    dtype: str


LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
}
TINY = {
    **LLAMA_8B,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
    "max_position_embeddings": 512,
}
H100 = Load(
    "cuda", LLAMA_8B, 1000, 220, 180, 256, 64, 16, 4096, 64, 1024, 64, 8192, 256, 4096, 0, 6 << 30, "bfloat16"
)
DRY = Load("cpu", TINY, 12, 22, 8, 16, 3, 2, 96, 4, 40, 6, 256, 8, 64, 8 << 20, 8 << 20, "float32")

YARDSTICKS = {
    "output_tokens_per_second": (16215.0, "SGLang, published"),
    "single_tokens_per_second": (222.0, "limit: 15 GB of weights a step"),
    "prefill_tokens_per_second": (65800.0, "limit: all arithmetic at full rate"),
    "idle_share": (0.02, "at most"),
}
LIMITS = {"engine": 240.0, "eager": 90.0, "pair": 120.0, "tests": 150.0}
"""Seconds for each part, in this order; none gets more than what is left of all."""


def make_model(folder: Path, load: Load) -> int:
    """A model of this shape with random weights, a file a layer. Bytes written."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = load.config
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    (folder / "tokenizer.json").write_text("{}")
    hidden, heads, kv = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    dim, wide, vocab = hidden // heads, config["intermediate_size"], config["vocab_size"]
    torch.manual_seed(0)

    def matrix(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=load.device).normal_(0, 0.02).cpu()

    written, names = 0, {}

    def write(file: str, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal written
        save_file(tensors, folder / file)
        written += sum(tensor.nbytes for tensor in tensors.values())
        names.update(dict.fromkeys(tensors, file))

    write("embedding.safetensors", {"model.embed_tokens.weight": matrix(vocab, hidden)})
    write("head.safetensors", {"lm_head.weight": matrix(vocab, hidden), "model.norm.weight": torch.ones(hidden)})
    for i in range(config["num_hidden_layers"]):
        shapes = {
            "self_attn.q_proj": (heads * dim, hidden),
            "self_attn.k_proj": (kv * dim, hidden),
            "self_attn.v_proj": (kv * dim, hidden),
            "self_attn.o_proj": (hidden, heads * dim),
            "mlp.gate_proj": (wide, hidden),
            "mlp.up_proj": (wide, hidden),
            "mlp.down_proj": (hidden, wide),
        }
        layer = {f"model.layers.{i}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            layer[f"model.layers.{i}.{norm}.weight"] = torch.ones(hidden)
        write(f"layer-{i:03}.safetensors", layer)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return written


def roomy(need: int) -> Path:
    """A place for so many bytes: memory where there is room, else a disk."""
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).free > need * 5 // 4:
        return shared
    return Path(tempfile.gettempdir())


def machine() -> dict[str, Any]:
    """What this was measured on."""
    import torch

    about: dict[str, Any] = {"torch": torch.__version__, "cpus": os.cpu_count(), "device": "cpu"}
    if torch.cuda.is_available():
        about |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    try:
        from importlib.metadata import version

        about["flashinfer"] = version("flashinfer-python")
    except ImportError:
        about["flashinfer"] = None
    return about


def gpu_tests() -> list[str]:
    """The command that runs the tests marked `cuda`, from files that have such: others may not even import here.

    Without the project's configuration, which names plugins that such a machine need not have.
    """
    files = [str(file) for file in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.cuda" in file.read_text()]
    plain = ["-c", os.devnull, "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
    return [sys.executable, "-m", "pytest", "-q", "-m", "cuda", *plain, *files]


def run_part(name: str, folder: Path, out: Path, dry: bool, limit: float) -> dict[str, Any]:
    """The figures of one part, or {"failed": why}."""
    began = time.monotonic()
    with (out / f"{name}.log").open("wb") as log:
        try:
            command = [sys.executable, "-m", "bench.h100_parts", name, str(folder), str(out)]
            command += ["--dry"] if dry else []
            if name == "tests":
                command = gpu_tests()
            done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=limit)
        except subprocess.TimeoutExpired:
            return {"failed": f"not done within {limit:.0f} s"}
    text = (out / f"{name}.log").read_text(errors="replace").strip()
    if name == "tests":
        counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|error)", text)}
        return {"status": done.returncode, **counts, "seconds": round(time.monotonic() - began, 1)}
    if done.returncode:
        return {"failed": text.splitlines()[-1] if text else f"status {done.returncode}"}
    figures: dict[str, Any] = json.loads((out / f"{name}.json").read_text())
    return figures | {"seconds": round(time.monotonic() - began, 1)}


def beside_eager(parts: dict[str, Any]) -> None:
    """Say how many times as fast one stream and a batch are by CUDA graphs, if there were any."""
    if not parts["engine"].get("graph_steps"):
        return
    for name in ("single", "batch"):
        by_graphs, eager = (parts[part].get(f"{name}_tokens_per_second") for part in ("engine", "eager"))
        if by_graphs and eager:
            parts["eager"][f"graphs_over_eager_{name}"] = by_graphs / eager


def show(console: Console, results: dict[str, Any]) -> None:
    """All figures in one table, with the yardsticks beside them."""
    where = results["machine"]
    table = Table("part", "figure", "value", "yardstick", title=f"{where['device']}, torch {where['torch']}")
    for part, figures in results["parts"].items():
        for name, value in figures.items():
            mark, what = YARDSTICKS.get(name, (None, ""))
            beside = "" if mark is None else f"{mark:,g} ({what})"
            shown = f"{value:,.4g}" if isinstance(value, float) else str(value)
            table.add_row(part, name.replace("_", " "), shown, beside)
    console.print(table)
    console.print(f"all of it took {results['seconds']:.0f} s" + (", as a dry run" if results["dry"] else ""))


def main() -> int:
    """The command. 1 if a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("h100-results"), help="for h100.json and the parts' logs")
    parser.add_argument("--dry", action="store_true", help="a tiny shape on the CPU: shows that it works")
    options = parser.parse_args()
    out, began = options.out.absolute(), time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    load = DRY if options.dry else H100
    results: dict[str, Any] = {"machine": machine(), "dry": options.dry, "load": asdict(load), "parts": {}}
    folder = Path(tempfile.mkdtemp(prefix="kvasir-h100-", dir=roomy(20 << 30 if load is H100 else 1 << 20)))
    try:
        size = make_model(folder, load)
        made = time.monotonic() - began
        results["parts"]["model"] = {"gigabytes": size / 1e9, "seconds": round(made, 1)}
        for name, limit in LIMITS.items():
            left = SECONDS - (time.monotonic() - began)
            results["parts"][name] = run_part(name, folder, out, options.dry, max(1.0, min(limit, left)))
        beside_eager(results["parts"])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    results["seconds"] = round(time.monotonic() - began, 1)
    (out / "h100.json").write_text(json.dumps(results, indent=1))
    show(Console(width=120), results)
    # Of pytest's counts "failed" is 0 when it is not there.
    broken = [name for name, figures in results["parts"].items() if "failed" in figures or figures.get("status")]
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
