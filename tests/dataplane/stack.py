"""The shipped manifest, run by `kvasir up --detach` as a user would, and what tests ask of it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import yaml
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[2]
KVASIR = str(Path(sys.executable).with_name("kvasir"))


@dataclass(frozen=True)
class Stack:
    """A running InferenceService."""

    url: str
    environment: dict[str, str]

    def status(self) -> Any:
        """What `kvasir status -o json` prints, read where it reads."""
        (file,) = Path(self.environment["KVASIR_STATE"]).glob("*/state.json")
        return json.loads(file.read_bytes())

    def pods(self, role: str) -> list[Any]:
        return [pod for pod in self.status()["pods"] if pod["role"] == role]

    @cached_property
    def _serving(self) -> list[Any]:
        """As they were when they were first asked for: a pod keeps its address when it is started again."""
        return list(self.status()["pods"])

    def metric(self, role: str, name: str, **labels: str) -> float:
        """A metric's value, summed over the pods of `role`."""
        return sum(metric(pod, name, **labels) for pod in self._serving if pod["role"] == role)


def metric(pod: Any, name: str, **labels: str) -> float:
    """A metric's value in one pod."""
    text = httpx.get(pod["url"] + "/metrics", timeout=60).raise_for_status().text
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def kvasir(*args: str, env: dict[str, str], check: bool = True) -> str:
    """Run the command; its standard output."""
    done = subprocess.run([KVASIR, *args], env=env, capture_output=True, text=True, timeout=400)
    assert not check or done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def running(folder: Path, dtype: str) -> Iterator[Stack]:
    """`manifests/smollm2-cpu.yaml` in `dtype`, up; stopped afterwards, with nothing left."""
    manifest = yaml.safe_load((ROOT / "manifests" / "smollm2-cpu.yaml").read_text())
    manifest["spec"]["model"]["dtype"] = dtype
    file = folder / f"{dtype}.yaml"
    file.write_text(yaml.safe_dump(manifest))
    environment = {**os.environ, "KVASIR_STATE": str(folder / f"state-{dtype}")}
    kvasir("up", "-f", str(file), "--detach", "--port", "0", env=environment)
    try:
        shown = json.loads(kvasir("status", "-o", "json", env=environment))
        assert shown["name"] == manifest["metadata"]["name"]
        pids = [pod["pid"] for pod in shown["pods"]]
        yield Stack(shown["url"], environment)
    finally:
        kvasir("down", env=environment)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()], "processes outlive `kvasir down`"
