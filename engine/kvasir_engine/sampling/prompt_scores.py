"""Log-probabilities of prompt tokens, from the logits of the tokens before them.

A long prompt's logits are never all in memory: they come in slices, and only the scores of each are kept.
"""

from collections.abc import Sequence

import torch

from kvasir_engine.pinned_memory import fetched, staged
from kvasir_engine.protocol import PromptLogprobs

SLICE = 128
"""The largest number of rows of logits in a slice."""


class PromptScores:
    """The scores of one step's `scored` rows (see `ForwardBatch`), on the logits' device until `finish`."""

    def __init__(self, scored: Sequence[tuple[int, int, int]], device: torch.device) -> None:
        self._counts = [count for _, _, count in scored]
        self._targets = staged(torch.tensor([token for _, token, _ in scored], dtype=torch.int64), device)
        self._parts: list[tuple[torch.Tensor, ...]] = []
        self._taken = 0
        self._done: list[torch.Tensor] = []

    def take(self, logits: torch.Tensor) -> None:
        """Score the next rows by their `logits` [at most SLICE, vocab], float32; does not wait for a GPU."""
        targets = self._targets[self._taken : self._taken + len(logits)].unsqueeze(1)
        self._taken += len(logits)
        chosen = logits.gather(1, targets)
        ranks = (logits > chosen).sum(-1) + 1
        whole = logits.logsumexp(-1, keepdim=True)
        top = logits.topk(min(max(self._counts), logits.shape[1]), -1)
        self._parts.append(((chosen - whole).squeeze(1), ranks, top.indices, top.values - whole))

    def finish(self) -> None:
        """Send the scores to the host, after all rows were taken."""
        joined = [torch.cat(parts) for parts in zip(*self._parts, strict=True)]
        self._parts.clear()
        self._done = [fetched(each) for each in joined]

    def collect(self) -> list[PromptLogprobs]:
        """The scores, row after row. Call it only when the device has finished what was queued."""
        columns = (each.tolist() for each in self._done)
        return [
            PromptLogprobs(logprob, rank, list(zip(ids[:count], values[:count], strict=True)))
            for count, logprob, rank, ids, values in zip(self._counts, *columns, strict=True)
        ]
