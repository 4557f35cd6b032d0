"""Tensor parallelism: how a model is divided among ranks, and how the ranks add up and join their parts.

The division is Megatron-LM's (Shoeybi et al. 2019): matrices that widen are cut by columns (Q, K and V by heads,
gate and up by the intermediate dimension), those that narrow again by rows, and their partial products are added.
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch

from kvasir_engine.model.config import ModelConfig
from kvasir_engine.model.errors import ModelError

CONNECT_SECONDS = 120.0
"""How long ranks wait for one another to connect, and for one another in each exchange."""


class Group(Protocol):
    """The ranks of one model. Every rank makes the same calls in the same order; each waits for all."""

    rank: int
    size: int

    def all_reduce(self, x: torch.Tensor) -> None:
        """Add up the ranks' `x`, of one shape and dtype, in place: every rank gets the same bits."""
        ...

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """[..., n] of each rank, joined in their order: [..., size * n]."""
        ...


class _Alone:
    """The group of one."""

    rank = 0
    size = 1

    def all_reduce(self, x: torch.Tensor) -> None:
        """See Group."""

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """See Group."""
        return x


ALONE: Group = _Alone()
"""A model that is whole in this process."""


class Ranks:
    """This process as one of `size` ranks: NCCL between GPUs, gloo on loopback between CPU processes.

    `address` is where rank 0 listens, `tcp://127.0.0.1:PORT`, or a file that does not exist yet, `file:///PATH`. A
    process can be in one group only. Raises ModelError when not all ranks come within CONNECT_SECONDS; a call fails
    with RuntimeError when another rank has died.
    """

    def __init__(self, rank: int, size: int, address: str, device: torch.device) -> None:
        import torch.distributed as dist

        self.rank = rank
        self.size = size
        if device.type == "cuda":
            torch.cuda.set_device(device)  # what is allocated without a device, by NCCL and kernels, is its own too
        # The ranks of a worker share its pod: nobody outside should be able to connect.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        try:
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                init_method=address,
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=CONNECT_SECONDS),
                device_id=device if device.type == "cuda" else None,
            )
        except (RuntimeError, ValueError) as error:
            raise ModelError(f"rank {rank} of {size} cannot connect to the others at {address}: {error}") from None

    def all_reduce(self, x: torch.Tensor) -> None:
        """See Group."""
        torch.distributed.all_reduce(x)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """See Group."""
        parts = [torch.empty_like(x) for _ in range(self.size)]
        torch.distributed.all_gather(parts, x.contiguous())
        return torch.cat(parts, -1)

    def close(self) -> None:
        """Leave the group."""
        torch.distributed.destroy_process_group()


@dataclass(frozen=True)
class Shard:
    """What one rank holds of a model: query heads, KV heads, columns of the MLP, logits of the vocabulary.

    `experts` are the columns of every expert: each rank has a part of all of them.
    """

    heads: range
    kv_heads: range
    intermediate: range
    experts: range
    vocab: range


def shard(config: ModelConfig, rank: int = 0, size: int = 1) -> Shard:
    """What `rank` of `size` holds.

    With more ranks than KV heads, each rank has a copy of the one KV head that its query heads use. Raises
    ModelError when the model cannot be divided so.
    """
    kv_heads = config.kv_heads
    if size <= kv_heads:
        kept = _part("KV heads", kv_heads, rank, size)
    elif size % kv_heads:
        raise ModelError(f"tensor parallel size {size} is no multiple of the model's {kv_heads} KV heads")
    else:
        head = rank * kv_heads // size
        kept = range(head, head + 1)
    experts = config.experts
    dense = experts is None or len(experts.layers) < config.layers
    return Shard(
        heads=_part("attention heads", config.heads, rank, size),
        kv_heads=kept,
        intermediate=_part("intermediate columns", config.intermediate if dense else 0, rank, size),
        experts=_part("columns of an expert", experts.intermediate if experts else 0, rank, size),
        vocab=_part("vocabulary entries", config.vocab, rank, size),
    )


def _part(what: str, count: int, rank: int, size: int) -> range:
    if count % size:
        raise ModelError(f"tensor parallel size {size} does not divide the model's {count} {what}")
    each = count // size
    return range(rank * each, (rank + 1) * each)
