"""To zero and back on the real control plane: a request finds no worker, waits for a pair, is answered right."""

import time
from collections.abc import Iterator

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from e2e import steps, tiny
from e2e.controlplane import binaries
from e2e.controlplane.cluster import Cluster
from e2e.steps import Object, condition, eventually, pods

NAMESPACE = "asleep"
NAME = "sleeper"
WORKERS = f"serving.kvasir.dev/inferenceservice={NAME},serving.kvasir.dev/role in (prefill,decode)"
READY_SECONDS = 180
# How long nobody asks before the workers go.
IDLE_SECONDS = 5
# Longer than the least that is sent to prefill.
PROMPT = [(11 + 7 * i) % 200 for i in range(60)]
TOKENS = 12


def service() -> Object:
    """The tiny model, without a worker to begin with."""
    workers = {
        "replicas": 0,
        "device": "cpu",
        "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}},
    }
    auto = {
        "prefill": {"maxReplicas": 1},
        "decode": {"maxReplicas": 1},
        "stabilizationWindowSeconds": IDLE_SECONDS,
        "scaleToZero": {"idleSeconds": IDLE_SECONDS, "holdSeconds": READY_SECONDS, "holdRequests": 8},
    }
    return {
        "apiVersion": "serving.kvasir.dev/v1alpha1",
        "kind": "InferenceService",
        "metadata": {"name": NAME},
        "spec": {
            "model": {"uri": tiny.URI, "name": NAME, "dtype": "float32"},
            "engine": {"kvCacheMemory": "64Mi"},
            "prefill": workers,
            "decode": workers,
            "scaling": {"mode": "Auto", "auto": auto},
            "drain": {"deadlineSeconds": 30},
        },
    }


@pytest.fixture(scope="module")
def namespace(cluster: Cluster) -> Iterator[str]:
    tiny.make()
    with steps.scratch(cluster, NAMESPACE) as name:
        yield name
        cluster.kubectl("-n", name, "delete", "kvi", "--all", "--timeout=120s")


def expected() -> str:
    """What the model says, by transformers and tokenizers."""
    folder = binaries.cache() / "e2e-tiny"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        output = model.generate(torch.tensor([PROMPT]), max_new_tokens=TOKENS, do_sample=False)
    text: str = Tokenizer.from_file(str(folder / "tokenizer.json")).decode(output[0, len(PROMPT) :].tolist())
    return text


def test_a_request_wakes_a_pair_and_the_pair_sleeps_again(cluster: Cluster, namespace: str) -> None:
    steps.apply(cluster, service(), namespace=namespace)
    stored = steps.wait_ready(cluster, namespace, NAME, READY_SECONDS)
    assert condition(stored, "Ready")["reason"] == "ScaledToZero"
    assert pods(cluster, namespace, WORKERS) == []

    began = time.monotonic()
    client = steps.client(cluster, namespace, NAME, READY_SECONDS)
    answer = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=TOKENS, temperature=0)
    print(f"answered {time.monotonic() - began:.1f} s after it was asked, a pair's start included")
    assert answer.choices[0].text == expected()
    running = [pod["metadata"]["labels"]["serving.kvasir.dev/role"] for pod in pods(cluster, namespace, WORKERS)]
    assert sorted(running) == ["decode", "prefill"]

    began = time.monotonic()
    eventually(lambda: not pods(cluster, namespace, WORKERS), READY_SECONDS, "both workers are gone", cluster)
    print(f"both workers had gone {time.monotonic() - began:.1f} s after the answer, {IDLE_SECONDS} s of them idle")
    said = cluster.get("kvi", NAME, "-n", namespace)["status"]
    assert condition({"status": said}, "Ready")["status"] == "True"
    assert {role: said["scaling"][role]["replicas"] for role in ("prefill", "decode")} == {
        "prefill": 0,
        "decode": 0,
    }
    events = cluster.get("events", "-n", namespace)["items"]
    told = [each["message"] for each in events if each["reason"] in ("ScaledUp", "ScaledDown")]
    assert sorted(each.partition(":")[0] for each in told) == [
        "decode from 0 to 1",
        "decode from 1 to 0",
        "prefill from 0 to 1",
        "prefill from 1 to 0",
    ], "each change is told once"
    assert "prefill from 0 to 1: 1 requests wait" in told
