"""What the machine's processors do, from /proc: whose time it was, and who descends from whom."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class _Process:
    parent: int
    seconds: float  # of processor time, with that of children that ended


def _processes() -> dict[int, _Process]:
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it ended meanwhile
                continue
            found[int(entry.name)] = _Process(int(fields[1]), sum(map(int, fields[11:15])) / TICKS)
    return found


def tree(root: int) -> list[int]:
    """`root` and all that descend from it, parents before children."""
    processes = _processes()
    found = [root] if root in processes else []
    for parent in found:
        found += [pid for pid, process in processes.items() if process.parent == parent]
    return found


@dataclass(frozen=True)
class Clock:
    """A moment: seconds of wall time, of all processors' work, and of the work of some processes."""

    wall: float
    busy: float
    ours: float

    @classmethod
    def now(cls, *roots: int) -> "Clock":
        """`roots`: the processes whose trees count as ours."""
        processes = _processes()
        pids = {pid for root in roots for pid in tree(root)}
        # user nice system idle iowait irq softirq steal; what a hypervisor stole is others' work as well
        fields = [int(each) for each in Path("/proc/stat").read_text().split(maxsplit=9)[1:9]]
        busy = sum(fields) - fields[3] - fields[4]
        ours = sum(processes[pid].seconds for pid in pids if pid in processes)
        return cls(time.monotonic(), busy / TICKS, ours)

    def others(self, later: "Clock") -> float:
        """Cores that were busy with anything else than our processes between this moment and `later`."""
        work = (later.busy - self.busy) - (later.ours - self.ours)
        return max(0.0, work / (later.wall - self.wall))


def describe() -> str:
    """The processor and how many cores of it this process may use."""
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return f"{len(os.sched_getaffinity(0))} cores of {model}, load average {os.getloadavg()[0]:.1f}"
