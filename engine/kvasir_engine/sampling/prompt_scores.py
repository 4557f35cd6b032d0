"""Log-probabilities of prompts' tokens, from the logits behind the tokens before them.

The logits of a long prompt are never there at once: they come in slices, and of each only the scores are kept.
"""

from collections.abc import Sequence

import torch

from kvasir_engine.pinned_memory import fetched, staged
from kvasir_engine.protocol import PromptLogprobs

SLICE = 128
"""Most rows of logits at once."""


class PromptScores:
    """The scores of one step's `scored` rows, as `ForwardBatch` has them, on the logits' device until `finish`."""

    def __init__(self, scored: Sequence[tuple[int, int, int]], device: torch.device) -> None:
        self._counts = [count for _, _, count in scored]
        self._targets = staged(torch.tensor([token for _, token, _ in scored], dtype=torch.int64), device)
        self._parts: list[tuple[torch.Tensor, ...]] = []
        self._taken = 0
        self._done: list[torch.Tensor] = []

    def take(self, logits: torch.Tensor) -> None:
        """Score the next rows by their `logits` [at most SLICE, vocab], float32; on a GPU nothing waits for it."""
        targets = self._targets[self._taken : self._taken + len(logits)].unsqueeze(1)
        self._taken += len(logits)
        chosen = logits.gather(1, targets)
        ranks = (logits > chosen).sum(-1) + 1
        whole = logits.logsumexp(-1, keepdim=True)
        top = logits.topk(min(max(self._counts), logits.shape[1]), -1)
        self._parts.append(((chosen - whole).squeeze(1), ranks, top.indices, top.values - whole))

    def finish(self) -> None:
        """All rows were taken: send the scores to the host."""
        joined = [torch.cat(parts) for parts in zip(*self._parts, strict=True)]
        self._parts.clear()
        self._done = [fetched(each) for each in joined]

    def collect(self) -> list[PromptLogprobs]:
        """The scores, row after row. Only when the device has ended what was queued."""
        columns = (each.tolist() for each in self._done)
        return [
            PromptLogprobs(logprob, rank, list(zip(ids[:count], values[:count], strict=True)))
            for count, logprob, rank, ids, values in zip(self._counts, *columns, strict=True)
        ]
