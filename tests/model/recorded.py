"""CUDA graphs without CUDA: what work does to tensors, recorded op by op, and done again on the same tensors.

As a graph it has the memory that it was recorded with, and nothing else of the work: no Python of it runs again.
What ops made while it was recorded is the graph's own memory, which other graphs use in between.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Recording(TorchDispatchMode):
    """The ops within this context."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[torch.Tensor]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host waited for a number"
        assert func is not torch.ops.aten.nonzero.default, "the host waited for a count"
        self.calls.append((func, args, kwargs or {}, _tensors(out)))
        return out

    def given(self) -> dict[int, torch.Tensor]:
        """The memory that was there before: a tensor in it by its address."""
        made: set[int] = set()
        given: dict[int, torch.Tensor] = {}
        for _, args, kwargs, outs in self.calls:
            for tensor in _tensors((args, kwargs)):
                if tensor.numel() and _memory(tensor) not in made:
                    given.setdefault(_memory(tensor), tensor)
            made |= {_memory(out) for out in outs if _memory(out) not in given}
        return given

    def replay(self) -> None:
        """Do it again."""
        given = self.given()
        for _, _, _, outs in self.calls:
            for out in outs:
                if _memory(out) not in given:
                    out.fill_(float("nan") if out.is_floating_point() else 1 << 5)
        for func, args, kwargs, outs in self.calls:
            for out, again in zip(outs, _tensors(func(*args, **kwargs)), strict=True):
                if _memory(out) != _memory(again):
                    out.copy_(again)


class Recorder:
    """Stands in for CudaRecorder."""

    def __init__(self) -> None:
        self.recordings: list[Recording] = []
        self.replays = 0

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        recording = Recording()
        with recording:
            work()
        self.recordings.append(recording)

        def replay() -> None:
            self.replays += 1
            recording.replay()

        return replay
