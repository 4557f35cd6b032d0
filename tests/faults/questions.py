"""A small random model, questions to it, and the answers of one undisturbed engine."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvasir_engine.executor.model_runner import ModelRunner
from kvasir_engine.forward_batch import ForwardBatch
from kvasir_engine.protocol import Sampling
from kvasir_engine.sampling.sampler import SampleRequest, sample

LETTERS = [chr(code) for code in range(0x21, 0x7F)]
"""The vocabulary: a token a printable character, so that a text says exactly which tokens it is."""
VOCAB = len(LETTERS)
LONGEST = 320  # tokens of a sequence
PAGE = 8
# Logits of one token differ by about 1e-6 between batches. A question on which much more than that could change
# a token is no test of anything.
NOISE, TRIALS = 1e-3, 4


def make_model(folder: Path) -> None:
    """Two layers in float32, lively enough that the next token depends on the whole context."""
    torch.manual_seed(7)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            vocab_size=VOCAB,
            max_position_embeddings=LONGEST,
            initializer_range=0.3,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    model.save_pretrained(folder)
    rust = Tokenizer(models.BPE({letter: token for token, letter in enumerate(LETTERS)}, []))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=rust).save_pretrained(folder)


@dataclass(frozen=True)
class Question:
    """A request for `count` tokens; greedy, or sampled with a seed."""

    prompt: tuple[int, ...]
    count: int
    seed: int | None = None

    @property
    def sampling(self) -> Sampling:
        if self.seed is None:
            return Sampling(self.count)
        return Sampling(self.count, temperature=0.8, seed=self.seed)

    @property
    def body(self) -> dict[str, object]:
        """As POST /v1/completions wants it."""
        body = {"model": "small", "prompt": list(self.prompt), "max_tokens": self.count, "temperature": 0.0}
        return body if self.seed is None else {**body, "temperature": 0.8, "seed": self.seed}


class Reference:
    """One engine's numerics, a sequence at a time, in this process."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        self.folder = folder
        self.answers: dict[Question, str] = {}
        self._runner = ModelRunner(folder, dtype="float32", device="cpu", page_size=16, pages=LONGEST // 16)

    def ask(self, candidates: Sequence[Question]) -> list[Question]:
        """Those of `candidates` whose answer does not hang on a rounding error; `answers` has theirs."""
        for question in candidates:
            if question not in self.answers:
                answer = self._answer(question)
                if answer is not None:
                    self.answers[question] = "".join(LETTERS[token] for token in answer)
        return [question for question in candidates if question in self.answers]

    def _answer(self, question: Question) -> list[int] | None:
        tokens, computed, table = list(question.prompt), 0, torch.arange(LONGEST // 16)[None]
        while len(tokens) < len(question.prompt) + question.count:
            fresh = torch.tensor(tokens[computed:])
            positions = torch.arange(computed, len(tokens))
            logits = self._runner.forward(ForwardBatch(fresh, positions, [len(fresh)], [len(tokens)], table))
            computed = len(tokens)
            request = SampleRequest(question.sampling, len(tokens), len(tokens) - len(question.prompt))
            noisy = logits + NOISE * (2 * torch.rand(TRIALS, VOCAB) - 1)
            tokens += sample(logits, [request]).tokens
            if set(sample(noisy, [request] * TRIALS).tokens) != {tokens[-1]}:
                return None
        return tokens[len(question.prompt) :]


def random_questions(rng: random.Random, count: int, longest: int = 160, most: int = 20) -> list[Question]:
    """Prompts of all lengths, many of them with a beginning in common."""
    beginnings = [rng.choices(range(VOCAB), k=longest) for _ in range(1 + count // 10)]
    questions = []
    for _ in range(count):
        shared = rng.choice(beginnings)[: rng.randint(0, longest - 1)] if rng.random() < 0.5 else []
        own = rng.choices(range(VOCAB), k=rng.randint(1, longest - len(shared)))
        seed = rng.randrange(1 << 30) if rng.random() < 0.3 else None
        questions.append(Question((*shared, *own), rng.randint(1, most), seed))
    return questions
