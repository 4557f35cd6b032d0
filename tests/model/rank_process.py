"""One rank of a model: `rank_process.py RANK SIZE ADDRESS WORK`, a process of its own as in a worker.

WORK is a JSON file: [{"folder", "dtype", "prompts", "steps", "most_tokens"}], with "deterministic" if so. The
logits after each step of each model are written beside it, as `logits-RANK.pt`.
"""

import json
import sys
from pathlib import Path

import torch
from sequences import Sequences

from kvasir_engine.executor.model_runner import ModelRunner
from kvasir_engine.model.tensor_parallel import Ranks

torch.set_num_threads(1)


def main(rank: int, size: int, address: str, work: Path) -> None:
    group = Ranks(rank, size, address, torch.device("cpu"))
    results = []
    for job in json.loads(work.read_text()):
        invariant = job.get("deterministic", False)
        runner = ModelRunner(
            Path(job["folder"]),
            device="cpu",
            page_size=16 if invariant else 4,
            pages=128,
            group=group,
            dtype=job["dtype"],
            deterministic=invariant,
        )
        sequences = Sequences(runner, job["prompts"], job["most_tokens"])
        logits = [sequences.step({int(i): count for i, count in step.items()}) for step in job["steps"]]
        results.append((runner.pool.shape.kv_heads, logits))
    torch.save(results, work.with_name(f"logits-{rank}.pt"))
    group.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
