"""Sequences in a runner's pool, fed step by step. Imports no transformers, so that rank processes start quickly."""

import torch

from kvasir_engine.executor.model_runner import ModelRunner
from kvasir_engine.forward_batch import ForwardBatch


class Sequences:
    """Some sequences in a runner's pool, with pages of their own in random order."""

    def __init__(self, runner: ModelRunner, prompts: list[list[int]], most_tokens: int, seed: int = 0) -> None:
        self._runner = runner
        self._prompts = prompts
        self._done = [0] * len(prompts)
        pages = -(-most_tokens // runner.pool.page_size)
        shuffled = torch.randperm(runner.pool.pages, generator=torch.Generator().manual_seed(seed))
        self._pages = shuffled[: pages * len(prompts)].view(len(prompts), pages)

    def reuse(self, source: int, target: int, tokens: int) -> None:
        """Let `target` begin with the pages of `source` for the first `tokens`, in whole pages, which both have."""
        pages, rest = divmod(tokens, self._runner.pool.page_size)
        assert not rest
        assert self._prompts[source][:tokens] == self._prompts[target][:tokens]
        self._pages[target, :pages] = self._pages[source, :pages]
        self._done[target] = tokens

    def kv(self, index: int) -> torch.Tensor:
        """A copy of the KV of a sequence's tokens so far, [layers, 2, kv_heads, tokens, head_dim]."""
        pages = self._runner.pool.tensor[self._pages[index]]
        return pages.permute(1, 2, 3, 0, 4, 5).flatten(3, 4)[:, :, :, : self._done[index]].clone()

    def step(self, counts: dict[int, int]) -> torch.Tensor:
        """Feed each sequence its next tokens, so many; logits [len(counts), vocab] after them."""
        new = {i: self._prompts[i][self._done[i] : self._done[i] + count] for i, count in counts.items()}
        positions = [torch.arange(self._done[i], self._done[i] + count) for i, count in counts.items()]
        for i, count in counts.items():
            self._done[i] += count
        batch = ForwardBatch(
            tokens=torch.tensor([token for tokens in new.values() for token in tokens]),
            positions=torch.cat(positions),
            query_lens=list(counts.values()),
            context_lens=[self._done[i] for i in counts],
            page_table=self._pages[list(counts)],
        )
        return self._runner.forward(batch)


def random_tokens(count: int, vocab: int, seed: int) -> list[int]:
    """`count` token ids."""
    tokens: list[int] = torch.randint(vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return tokens
