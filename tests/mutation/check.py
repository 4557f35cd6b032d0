"""The mutation check: put one fault at a time into a copy of the package and run the fast pure suites against it.

    python tests/mutation/check.py [--seed N] [--jobs N] [--only TEXT]

Prints a table (mutant, the test that caught it, seconds) and exits 1 if a mutant survives. The working tree is
never changed. `--seed` is hypothesis's: with the same seed the same schedules run, so the outcome is the same.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mutants import MUTANTS, Mutant

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PACKAGE = ROOT / "engine" / "kvasir_engine"
SUITES = (
    "tests/kv",
    "tests/connector/test_lease_machines.py",
    "tests/connector/test_digest.py",
    "tests/connector/test_parts.py",
    "tests/connector/test_layout.py",
    "tests/connector/test_lease_executor.py",
    "tests/connector/test_rank_leases.py",
    "tests/connector/test_reads.py",
    "tests/core/test_schedule.py",
    "tests/core/test_queue.py",
    "tests/core/test_readback.py",
    "tests/core/test_readback_blocks.py",
    "tests/core/test_known_faults.py",
    "tests/core/test_engine_handoffs.py",
    "tests/core/test_engine_failures.py",
    "tests/core/test_engine_queue.py",
    "tests/core/test_overlap.py",
    "tests/core/test_engine_schedules.py",
    "tests/core/test_scored_prompts.py",
)
LIMIT = 300.0
"""Seconds a mutant gets; whoever is not done hangs, and a hang that the suite shows is caught."""


@dataclass(frozen=True)
class Outcome:
    """`caught` names the test that failed, or is empty. `trouble`: the mutant could not be judged."""

    mutant: Mutant
    caught: str
    seconds: float
    trouble: str = ""


def copy_package(to: Path) -> Path:
    """The package below `to`, which then goes first on PYTHONPATH."""
    shutil.copytree(PACKAGE, to / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    return to


def run(mutant: Mutant, source: Path, seed: int) -> Outcome:
    """Run the suites against a copy of the package at `source` with the fault in it."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kvasir-mutant-") as folder:
        copy = Path(folder)
        shutil.copytree(source / PACKAGE.name, copy / PACKAGE.name)
        target = copy / PACKAGE.name / mutant.file
        target.write_text(mutant.apply(target.read_text()))
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(copy), str(HERE)]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HYPOTHESIS_STORAGE_DIRECTORY": str(copy / "hypothesis"),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "steady_hypothesis"]
        area = mutant.file.split("/")[0]
        suites = sorted(SUITES, key=lambda suite: f"/{area}" not in suite)  # its own tests first
        command += [f"--hypothesis-seed={seed}", f"--timeout={LIMIT:.0f}", "--tb=no", *suites]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    seconds = time.monotonic() - began
    failed = re.search(r"^FAILED (?:tests/)?(\S+)", result.stdout, re.MULTILINE)
    match result.returncode, failed:
        case 0, None:
            return Outcome(mutant, "", seconds)
        case 1, re.Match() as found:
            return Outcome(mutant, found[1], seconds)
        case 1, None if "Timeout" in result.stdout + result.stderr:
            return Outcome(mutant, "(the suite hangs)", seconds)
    return Outcome(mutant, "", seconds, (result.stdout + result.stderr)[-2000:])


def check(mutants: Iterable[Mutant], seed: int = 0, jobs: int = 1) -> Iterator[Outcome]:
    """The outcome of each mutant, in order, all against the package as it is now."""
    with tempfile.TemporaryDirectory(prefix="kvasir-source-") as folder, ThreadPoolExecutor(jobs) as pool:
        source = copy_package(Path(folder))
        yield from pool.map(lambda mutant: run(mutant, source, seed), mutants)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=0, help="hypothesis's seed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="mutants at once")
    parser.add_argument("--only", default="", help="mutants whose name or file contains this")
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if options.only in mutant.name or options.only in mutant.file]
    bad = 0
    print(f"{'mutant':58} {'file':20} {'s':>6}  caught by")
    for outcome in check(chosen, options.seed, options.jobs):
        mutant = outcome.mutant
        verdict = outcome.caught or ("CANNOT BE JUDGED" if outcome.trouble else "SURVIVED")
        print(f"{mutant.name:58} {mutant.file:20} {outcome.seconds:6.1f}  {verdict}", flush=True)
        if outcome.trouble:
            print(outcome.trouble)
        bad += not outcome.caught
    print(f"{len(chosen) - bad} of {len(chosen)} caught, seed {options.seed}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
