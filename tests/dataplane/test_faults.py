"""Clients that leave and workers that die, under real traffic: streams go on, and no page is lost."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from openai import OpenAI
from stack import Stack, metric

pytestmark = pytest.mark.dataplane

TOKENS = 32
ITEMS = [f"Item {number} of the list is a thing of some kind." for number in range(25)]
LONG = " ".join(ITEMS)
MEDIUM = " ".join(ITEMS[:10])
SETTLE_SECONDS = 10.0


def openai(stack: Stack) -> OpenAI:
    return OpenAI(base_url=stack.url + "/v1", api_key="none", max_retries=0, timeout=120)


def answer(client: OpenAI, prompt: str, at_token: threading.Event | None = None) -> str:
    """The streamed text; `at_token` is set when a few tokens have come."""
    parts = []
    stream = client.completions.create(
        model="smollm2",
        prompt=prompt,
        max_tokens=TOKENS,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    for part in stream:
        parts.append(part.choices[0].text)
        if at_token is not None and len(parts) == 8:
            at_token.set()
    return "".join(parts)


def wait_for_quiet(stack: Stack) -> None:
    """All pages of all workers are free or cached."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        owned = {
            (role, owner): stack.metric(role, "kvasir_kv_pages", owner=owner)
            for role in ("prefill", "decode")
            for owner in ("held", "leased", "fenced")
        }
        if not any(owned.values()):
            return
        assert time.monotonic() < deadline, owned
        time.sleep(0.1)


def wait_until_ready(stack: Stack) -> None:
    deadline = time.monotonic() + 60
    while not all(pod["ready"] for pod in stack.status()["pods"]):
        assert time.monotonic() < deadline, stack.status()
        time.sleep(0.2)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    while Path(f"/proc/{pid}").exists():
        time.sleep(0.01)


def test_clients_that_leave_take_no_page_with_them(float32: Stack) -> None:
    def leave(number: int) -> None:
        with openai(float32) as client:
            stream = client.completions.create(
                model="smollm2",
                prompt=f"{number}. {MEDIUM}",
                max_tokens=TOKENS,
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            for count, _ in enumerate(stream):
                if count == number:  # some leave during the handoff, some in mid-stream
                    break
            stream.close()

    with ThreadPoolExecutor(6) as several:
        list(several.map(leave, range(12)))
    wait_for_quiet(float32)


def test_a_stream_survives_the_death_of_its_decode_worker(float32: Stack) -> None:
    prompt = f"The list begins here. {LONG} The next"
    with openai(float32) as client:
        undisturbed = answer(client, prompt)
        begun = threading.Event()
        with ThreadPoolExecutor(1) as other:
            stream = other.submit(answer, client, prompt, begun)
            assert begun.wait(60)
            (busy,) = [pod for pod in float32.pods("decode") if metric(pod, "kvasir_requests_running")]
            kill(busy["pid"])
            assert stream.result() == undisturbed
    wait_until_ready(float32)
    assert [pod["restarts"] for pod in float32.pods("decode") if pod["name"] == busy["name"]] == [1]
    wait_for_quiet(float32)


def test_the_death_of_prefill_under_a_prompt_costs_the_client_nothing(float32: Stack) -> None:
    prompts = [f"Chapter {number}. {LONG}" for number in range(3)]
    with openai(float32) as client, ThreadPoolExecutor(3) as several:
        streams = [several.submit(answer, client, prompt) for prompt in prompts]
        while not float32.metric("prefill", "kvasir_requests_running"):
            assert not all(stream.done() for stream in streams), "too fast to be killed"
        kill(float32.pods("prefill")[0]["pid"])
        disturbed = [stream.result() for stream in streams]
        wait_until_ready(float32)
        assert disturbed == [answer(client, prompt) for prompt in prompts]
    wait_for_quiet(float32)
