"""A model so small that it can be wrong in one way only: by reading the wrong KV.

The KV of a token is a mix of its id and position. The next token is a hash over the KV of the whole context, read
from the pool through the page table. So a page that is stale, swapped, shared too early or written too late
changes the tokens, and `reference` says what they should have been.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from kvasir_engine.executor.step import FinishedStep, LaunchedStep
from kvasir_engine.forward_batch import ForwardBatch
from kvasir_engine.sampling.prompt_scores import PromptScores
from kvasir_engine.sampling.sampler import Sampled, SampleRequest, sample

VOCAB = 50
MASK = (1 << 31) - 1


def mix(token: int, position: int, layer: int) -> int:
    """The KV of a token."""
    return ((token + 1) * 2654435761 * (layer + 1) + (position + 1) * 40503 * (token + 7 + layer)) & MASK


def following(context: list[int]) -> int:
    """The token after `context`: a function of all of it."""
    total = sum(mix(token, place, layer) for place, token in enumerate(context) for layer in range(LAYERS))
    return total * 31 % 1000003 % VOCAB


def reference(prompt: list[int], count: int) -> list[int]:
    """What a right engine generates, greedy, without stop tokens."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(following(tokens))
    return tokens[len(prompt) :]


LAYERS = 2


@dataclass(frozen=True)
class ToyConfig:
    """What the engine reads of a model's configuration."""

    layers: int = LAYERS


class ToyPool:
    """The pool: one 64-bit number a token and layer."""

    def __init__(self, pages: int, page_size: int) -> None:
        self.pages, self.page_size, self.page_bytes = pages, page_size, LAYERS * page_size * 8
        self.tensor = torch.zeros((pages, LAYERS, page_size), dtype=torch.int64)

    @property
    def address(self) -> int:
        return self.tensor.data_ptr()


class ToyRunner:
    """Stands in for ModelRunner."""

    def __init__(self, pages: int, page_size: int) -> None:
        self.config = ToyConfig()
        self.vocab = VOCAB
        self.pool = ToyPool(pages, page_size)
        self.computed = 0
        self.sampled: list[int] = []

    def launch(
        self,
        batch: ForwardBatch,
        places: list[int],
        requests: list[SampleRequest],
        on_layer: Callable[[int], None] | None = None,
    ) -> LaunchedStep:
        """As ModelRunner has it: done when it returns."""
        for place, row in batch.awaited:
            batch.tokens[place] = self.sampled[row]
        scores = PromptScores(batch.scored, torch.device("cpu")) if batch.scored else None
        logits = self.forward(batch, on_layer) if scores is None else self.forward(batch, on_layer, scores)
        sampled = sample(logits[places], requests, self.sampled)
        self.sampled = sampled.tokens
        if scores is not None:
            scores.finish()
            sampled = replace(sampled, prompts=scores.collect())
        return FinishedStep(sampled)

    def copy_page(self, source: int, target: int) -> None:
        """As ModelRunner has it."""
        self.pool.tensor[target] = self.pool.tensor[source]

    def forward(
        self,
        batch: ForwardBatch,
        on_layer: Callable[[int], None] | None = None,
        scores: PromptScores | None = None,
    ) -> torch.Tensor:
        """One-hot logits [S, VOCAB] for the last token of each sequence; those of scored rows go to `scores`."""
        size, total = self.pool.page_size, [0] * len(batch.query_lens)
        sums = torch.zeros(len(batch.tokens), dtype=torch.int64)  # of the KV up to each token
        for layer in range(LAYERS):
            kv, start = self.pool.tensor[:, layer], 0
            for row, (count, context) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
                places = torch.arange(context)
                pages, slots = batch.page_table[row][places // size], places % size
                for offset in range(count):
                    position = int(batch.positions[start + offset])
                    assert position == context - count + offset
                    kv[pages[position], slots[position]] = mix(int(batch.tokens[start + offset]), position, layer)
                total[row] += int(kv[pages, slots].sum())
                sums[start : start + count] += kv[pages, slots].cumsum(0)[-count:]
                start += count
            if on_layer is not None:
                on_layer(layer)
        self.computed += sum(batch.query_lens)
        for place, _, _ in batch.scored:
            assert scores is not None
            scores.take(one_hot(sums[place].unsqueeze(0)))
        return one_hot(torch.tensor(total))


def one_hot(sums: torch.Tensor) -> torch.Tensor:
    """The logits after contexts whose KV comes to so much."""
    logits = torch.zeros(len(sums), VOCAB)
    logits[torch.arange(len(sums)), sums * 31 % 1000003 % VOCAB] = 1.0
    return logits


class LateRunner(ToyRunner):
    """A device with a queue: nothing happens when it is asked for, but all in order once a step is waited for.

    So what is read or written too early, by whoever does not go through the queue, is read or written too early
    here too. What a copy or a step finds in the pool is what is there when the queue comes to it.
    """

    def __init__(self, pages: int, page_size: int) -> None:
        super().__init__(pages, page_size)
        self.queue: deque[Callable[[], object]] = deque()

    def copy_page(self, source: int, target: int) -> None:
        """See ToyRunner."""
        self.queue.append(lambda: ToyRunner.copy_page(self, source, target))

    def launch(
        self,
        batch: ForwardBatch,
        places: list[int],
        requests: list[SampleRequest],
        on_layer: Callable[[int], None] | None = None,
    ) -> LaunchedStep:
        """See ToyRunner."""
        step = _LateStep(self)

        def compute() -> None:
            step.sampled = ToyRunner.launch(self, batch, places, requests, on_layer).wait()

        self.queue.append(compute)
        return step


@dataclass
class _LateStep:
    runner: LateRunner
    sampled: Sampled | None = None
    gap: float | None = None
    replayed: bool = False

    def wait(self) -> Sampled:
        while self.sampled is None:
            self.runner.queue.popleft()()
        return self.sampled
