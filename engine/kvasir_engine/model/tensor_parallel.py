"""Tensor parallelism: divides a model among ranks, and adds up and joins their results.

The division is Megatron-LM's (Shoeybi et al. 2019): the first matrices of attention and MLP are cut by columns (Q,
K and V by heads, gate and up by the intermediate dimension), the second ones by rows, and their partial products
are added.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch
from torch.distributed import Store  # type: ignore[attr-defined]

from kvasir_engine.errors import ModelError
from kvasir_engine.model.config import ModelConfig
from kvasir_engine.model.rendezvous import connect, use_interface

CONNECT_SECONDS = 120.0
"""Seconds that ranks wait for one another to connect, and in each exchange."""
LOAD_DAYS = 7
"""Days that ranks wait for one another to load. A rank that ends meanwhile ends the worker, so nobody waits in
vain.
"""


class ProcessGroup(Protocol):
    """The ranks of one model. Every rank makes the same calls in the same order; each waits for all."""

    rank: int
    size: int
    here: int
    """Ranks on this machine; `rank % here` is this one's number among them."""

    def loaded(self) -> None:
        """This rank has its part of a model: wait until all have, however long that takes."""
        ...

    def all_reduce(self, x: torch.Tensor) -> None:
        """Add up the ranks' `x`, of one shape and dtype, in place: every rank gets the same bits."""
        ...

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """[..., n] of each rank, joined in their order: [..., size * n]."""
        ...

    def broadcast(self, x: torch.Tensor) -> None:
        """Make `x`, of one shape and dtype, what rank 0 has there."""
        ...


class _Alone:
    """The group of one."""

    rank = 0
    size = 1
    here = 1

    def loaded(self) -> None:
        """See ProcessGroup."""

    def all_reduce(self, x: torch.Tensor) -> None:
        """See ProcessGroup."""

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """See ProcessGroup."""
        return x

    def broadcast(self, x: torch.Tensor) -> None:
        """See ProcessGroup."""


ALONE: ProcessGroup = _Alone()
"""A model that is whole in this process."""


class Ranks:
    """This process as one of `size` ranks on `nodes` machines: NCCL between GPUs, gloo between CPU processes.

    `address` is where rank 0's store is (`meeting.open_store`), `tcp://HOST:PORT`, or, on one machine, a file
    that does not exist yet, `file:///PATH`. A process can be in one group only. Raises ModelError when not all come
    within CONNECT_SECONDS; a call fails with RuntimeError when another rank has died.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        address: str,
        device: torch.device,
        nodes: int = 1,
        store: Store | None = None,
    ) -> None:
        import torch.distributed as dist

        self.rank = rank
        self.size = size
        self.here = size // nodes
        self._loads = 0
        if device.type == "cuda":
            device = torch.device("cuda", device.index or 0)
            torch.cuda.set_device(device)  # what is allocated without a device, by NCCL and kernels, is its own too
        use_interface(address, nodes)
        timeout = timedelta(seconds=CONNECT_SECONDS)
        try:
            self._store = store or connect(address, size, timeout)
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=self._store,
                rank=rank,
                world_size=size,
                timeout=timeout,
                device_id=device if device.type == "cuda" else None,
            )
        except (RuntimeError, ValueError) as error:
            raise ModelError(f"rank {rank} of {size} cannot connect to the others at {address}: {error}") from None

    def loaded(self) -> None:
        """See ProcessGroup. Through the store: an exchange ends after CONNECT_SECONDS; loading takes minutes."""
        self._loads += 1
        done = f"kvasir-loaded-{self._loads}"
        if self._store.add(f"{done}-count", 1) == self.size:
            self._store.set(done, "all")
        self._store.wait([done], timedelta(days=LOAD_DAYS))

    def all_reduce(self, x: torch.Tensor) -> None:
        """See ProcessGroup."""
        torch.distributed.all_reduce(x)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """See ProcessGroup."""
        parts = [torch.empty_like(x) for _ in range(self.size)]
        torch.distributed.all_gather(parts, x.contiguous())
        return torch.cat(parts, -1)

    def broadcast(self, x: torch.Tensor) -> None:
        """See ProcessGroup."""
        torch.distributed.broadcast(x, 0)

    def close(self) -> None:
        """Leave the group."""
        torch.distributed.destroy_process_group()


@dataclass(frozen=True)
class Shard:
    """One rank's part of a model: query heads, KV heads, columns of the MLP, logits of the vocabulary.

    `experts` are the columns of every expert: each rank has a part of all of them.
    """

    heads: range
    kv_heads: range
    intermediate: range
    experts: range
    vocab: range


def shard(config: ModelConfig, rank: int = 0, size: int = 1) -> Shard:
    """The part of `rank` of `size`.

    With more ranks than KV heads, each rank has a copy of the one KV head that its query heads use. Raises
    ModelError when the model cannot be divided like this.
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
