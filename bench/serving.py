"""Kvasir colocated, Kvasir disaggregated and vLLM on the five workloads of `load.py`, in turn on one machine.

    python -m bench.serving [--systems ...] [--workloads ...] [--rounds N] [--tries N] [--plot]

All servers are started first and then frozen. For each workload of each round they are thawed in turn, one at a
time, warmed up with prompts of their own, and measured, so that the machine's drift meets all alike. No prompt
comes twice: every measurement has its own seed, and a round's seed is the same for all systems. A measurement
during which other programs used the processor is repeated, up to `--tries` times. Results go to bench/results as
JSON; `--plot` also draws docs/serving-cpu.png.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from bench import machine
from bench.load import SEED, WORKLOADS, measure, workload
from bench.peer import Unavailable
from bench.report import QUIET, Measurement, plot, table
from bench.systems import NAME, SYSTEMS, Failed, Server
from rich.console import Console

PEER = "vllm"
WARM_UP = 10_000
"""Added to a seed for the prompts of its warm-up."""

ROOT = Path(__file__).resolve().parent.parent


def measured(server: Server, name: str, round_: int, attempt: int) -> Measurement:
    """One workload on a server that is frozen before and after."""
    seed = SEED + 100 * attempt + round_
    server.thaw()
    asyncio.run(measure(server.url, NAME, name, workload(name, WARM_UP + seed).begin()))
    load_average = os.getloadavg()[0]
    before = machine.Clock.now(os.getpid())
    row = asyncio.run(measure(server.url, NAME, name, workload(name, seed)))
    after = machine.Clock.now(os.getpid())
    server.freeze()
    return Measurement(server.name, round_, round(before.others(after), 3), round(load_average, 2), row)


def undisturbed(server: Server, name: str, round_: int, tries: int) -> Measurement:
    """The first measurement of at most `tries` that nothing disturbed, or else the least disturbed one."""
    taken = []
    for attempt in range(tries):
        taken.append(measured(server, name, round_, attempt))
        if taken[-1].others <= QUIET:
            break
    return min(taken, key=lambda m: m.others)


def started(names: Sequence[str], scratch: Path, stack: ExitStack) -> list[Server]:
    """Servers of the systems that can be had here, ready and frozen; the others are named with the reason."""
    servers = []
    for name in names:
        try:
            server = Server(name, SYSTEMS[name](scratch), scratch / f"{name}.log")
            stack.callback(server.stop)
            began = time.monotonic()
            server.wait_ready()
        except (Unavailable, Failed) as error:
            print(f"{name}: skipped: {error}", file=sys.stderr, flush=True)
            continue
        print(f"{name}: ready after {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        server.freeze()
        servers.append(server)
    return servers


def compare(arguments: argparse.Namespace, scratch: Path) -> list[Measurement]:
    """All measurements, in the order in which they were made."""
    results = []
    with ExitStack() as stack:
        servers = started(arguments.systems, scratch, stack)
        for round_ in range(arguments.rounds):
            for name in arguments.workloads:
                for server in servers:
                    result = undisturbed(server, name, round_, arguments.tries)
                    print(json.dumps(asdict(result)), file=sys.stderr, flush=True)
                    results.append(result)
    return results


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--plot", action="store_true")
    arguments = parser.parse_args()

    where = machine.describe()
    scratch = Path(tempfile.mkdtemp(prefix="kvasir-bench-"))
    results = compare(arguments, scratch)
    if not results:
        raise SystemExit("no system could be measured")
    target = ROOT / "bench" / "results" / f"serving-{time.strftime('%Y%m%d-%H%M%S')}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps({"machine": where, "results": [asdict(each) for each in results]}, indent=1))
    Console(width=150).print(table(results, arguments.workloads, arguments.systems, PEER))
    print(f"{where}\nresults: {target}")
    if arguments.plot:
        picture = ROOT / "docs" / "serving-cpu.png"
        try:
            plot(results, arguments.workloads, arguments.systems, where, picture)
        except ImportError:
            print("no plot: matplotlib is not installed (the extra `bench`)", file=sys.stderr)
        else:
            print(f"plot: {picture}")


if __name__ == "__main__":
    main()
