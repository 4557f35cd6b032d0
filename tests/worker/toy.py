"""A model so small that it can be wrong in one way only: by reading the wrong KV.

The KV of a token is a mix of its id and position. The next token is a hash over the KV of the whole context, read
from the pool through the page table. So a page that is stale, swapped, shared too early or written too late
changes the tokens, and `reference` says what they should have been.
"""

import torch

from kvasir_engine.model.batch import ForwardBatch

VOCAB = 50
MASK = (1 << 31) - 1


def mix(token: int, position: int) -> int:
    """The KV of a token."""
    return ((token + 1) * 2654435761 + (position + 1) * 40503 * (token + 7)) & MASK


def following(context: list[int]) -> int:
    """The token after `context`: a function of all of it."""
    return sum(mix(token, place) for place, token in enumerate(context)) * 31 % 1000003 % VOCAB


def reference(prompt: list[int], count: int) -> list[int]:
    """What a right engine generates, greedy, without stop tokens."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(following(tokens))
    return tokens[len(prompt) :]


class ToyPool:
    """The pool: one 64-bit number a token."""

    def __init__(self, pages: int, page_size: int) -> None:
        self.pages, self.page_size, self.page_bytes = pages, page_size, page_size * 8
        self.tensor = torch.zeros((pages, page_size), dtype=torch.int64)

    @property
    def address(self) -> int:
        return self.tensor.data_ptr()


class ToyRunner:
    """Stands in for ModelRunner."""

    def __init__(self, pages: int, page_size: int) -> None:
        self.vocab = VOCAB
        self.pool = ToyPool(pages, page_size)
        self.computed = 0

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """One-hot logits [S, VOCAB] for the last token of each sequence."""
        size, pool = self.pool.page_size, self.pool.tensor.view(-1)
        logits = torch.zeros(len(batch.query_lens), VOCAB)
        start = 0
        for row, (count, context) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
            table = batch.page_table[row].tolist()
            slots = [table[place // size] * size + place % size for place in range(context)]
            for offset in range(count):
                position = int(batch.positions[start + offset])
                assert position == context - count + offset
                pool[slots[position]] = mix(int(batch.tokens[start + offset]), position)
            start += count
            self.computed += count
            logits[row, int(pool[slots].sum()) * 31 % 1000003 % VOCAB] = 1.0
        return logits
