"""A step's chunks as the arrays that the model reads."""

from collections.abc import Callable
from collections.abc import Sequence as Seq

import torch

from kvasir_engine.core.sequence import Sequence
from kvasir_engine.forward_batch import ForwardBatch


def batch_of(chunks: Seq[tuple[Sequence, int]], page_size: int, rows: Callable[[Sequence], range]) -> ForwardBatch:
    """The batch that computes so many further tokens of each sequence. The sequences already have pages for them.

    `rows` says in which rows the previous step samples the tokens that a sequence awaits.
    """
    tokens: list[int] = []
    positions: list[int] = []
    awaited: list[tuple[int, int]] = []
    scored: list[tuple[int, int, int]] = []
    for sequence, count in chunks:
        end, first = sequence.computed + count, len(tokens) - sequence.computed
        for place in sequence.to_score(count):
            sampling = sequence.sampling
            most = sampling.prompt_logprobs if place < sequence.prompt - 1 else sampling.logprobs
            scored.append((first + place, sequence.tokens[place + 1], most or 0))
        tokens += sequence.tokens[sequence.computed : end]
        for row in rows(sequence)[: end - len(sequence.tokens)] if end > len(sequence.tokens) else ():
            awaited.append((len(tokens), row))
            tokens.append(0)
        positions += range(sequence.computed, end)
    context = [sequence.computed + count for sequence, count in chunks]
    used = [-(-length // page_size) for length in context]
    width = max(used)
    table = torch.tensor(
        [sequence.pages[:n] + [0] * (width - n) for (sequence, _), n in zip(chunks, used, strict=True)],
        dtype=torch.int64,
    )
    return ForwardBatch(
        torch.tensor(tokens),
        torch.tensor(positions),
        [count for _, count in chunks],
        context,
        table,
        tuple(awaited),
        tuple(scored),
    )
