"""Clients that leave and workers that die, under real traffic: streams go on, and no page is lost.

Who is to die is stopped first (SIGSTOP), so that what it was seen to work on is still its work when it is killed.
"""

import itertools
import os
import signal
import time
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from stack import Stack, metric

pytestmark = pytest.mark.dataplane

TOKENS = 32
ENDLESS = 4000
ITEMS = [f"Item {number} of the list is a thing of some kind." for number in range(25)]
LONG = " ".join(ITEMS)
MEDIUM = " ".join(ITEMS[:10])
SECONDS = 60.0


def openai(stack: Stack) -> OpenAI:
    return OpenAI(base_url=stack.url + "/v1", api_key="none", max_retries=0, timeout=300)


def pieces(client: OpenAI, prompt: str, tokens: int) -> Generator[str, None, None]:
    """The streamed text, as it comes."""
    with client.completions.create(
        model="smollm2",
        prompt=prompt,
        max_tokens=tokens,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    ) as stream:
        for part in stream:
            yield part.choices[0].text


def answer(client: OpenAI, prompt: str) -> str:
    return "".join(pieces(client, prompt, TOKENS))


def wait_for_quiet(stack: Stack) -> None:
    """All pages of all workers are free or cached."""
    deadline = time.monotonic() + SECONDS
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
    deadline = time.monotonic() + SECONDS
    while not all(pod["ready"] for pod in stack.status()["pods"]):
        assert time.monotonic() < deadline, stack.status()
        time.sleep(0.2)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    while Path(f"/proc/{pid}").exists():
        time.sleep(0.01)


def fields(pid: int) -> list[str]:
    """What /proc says of a process, from its state on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()


def computed(pid: int) -> float:
    """The seconds of a core that it has used."""
    return sum(map(int, fields(pid)[11:13])) / os.sysconf("SC_CLK_TCK")


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    while fields(pid)[0] != "T":
        time.sleep(0.001)


def stopped_at_work(prefill: int, decodes: list[Any], streams: list[Future[str]]) -> bool:
    """Stop prefill when it has computed, and decode still waits for its KV. False: it has done all the work."""
    idle = computed(prefill)
    while not all(stream.done() for stream in streams):
        stop(prefill)
        if computed(prefill) > idle + 0.1 and any(metric(pod, "kvasir_kv_leases", state="open") for pod in decodes):
            return True
        os.kill(prefill, signal.SIGCONT)
        time.sleep(0.02)
    return False


def test_clients_that_leave_take_no_page_with_them(float32: Stack) -> None:
    def leave(number: int) -> None:
        with openai(float32) as client:
            stream = pieces(client, f"{number}. {MEDIUM}", ENDLESS)
            for _ in range(number + 1):  # some leave during the handoff, some in mid-stream
                next(stream)
            stream.close()

    with ThreadPoolExecutor(6) as several:
        list(several.map(leave, range(12)))
    wait_for_quiet(float32)


def test_a_stream_survives_the_death_of_its_decode_worker(float32: Stack) -> None:
    prompt = f"The list begins here. {LONG} The next"
    decodes = float32.pods("decode")
    with openai(float32) as client:
        stream = pieces(client, prompt, ENDLESS)  # it cannot have ended by the time it is looked for
        text = "".join(itertools.islice(stream, 8))
        (busy,) = [pod for pod in decodes if metric(pod, "kvasir_requests_running")]
        kill(busy["pid"])
        text += "".join(itertools.islice(stream, TOKENS))
        stream.close()
        undisturbed = ""
        again = pieces(client, prompt, ENDLESS)
        while len(undisturbed) < len(text):
            undisturbed += next(again)
        again.close()
    assert undisturbed.startswith(text)
    wait_until_ready(float32)
    now = [pod["restarts"] for pod in float32.pods("decode") if pod["name"] == busy["name"]]
    assert now == [busy["restarts"] + 1]
    wait_for_quiet(float32)


def test_the_death_of_prefill_under_a_prompt_costs_the_client_nothing(float32: Stack) -> None:
    (prefill,), decodes = float32.pods("prefill"), float32.pods("decode")
    with openai(float32) as client, ThreadPoolExecutor(3) as several:
        for attempt in itertools.count():
            prompts = [f"Chapter {attempt}.{number}. {LONG}" for number in range(3)]
            streams = [several.submit(answer, client, prompt) for prompt in prompts]
            if stopped_at_work(prefill["pid"], decodes, streams):
                break
        kill(prefill["pid"])
        disturbed = [stream.result() for stream in streams]
        wait_until_ready(float32)
        assert disturbed == [answer(client, prompt) for prompt in prompts]
    assert [pod["restarts"] for pod in float32.pods("prefill")] == [prefill["restarts"] + 1]
    wait_for_quiet(float32)
