"""Launched steps of a model, for which the engine waits."""

from dataclasses import dataclass
from typing import Protocol

from kvasir_engine.sampling.sampler import Sampled


class LaunchedStep(Protocol):
    """A launched step: one batch."""

    def wait(self) -> Sampled:
        """Wait until the step has written all KV and called back for each layer; returns the sampled tokens. Raises
        the error of a failed step."""
        ...

    @property
    def replayed(self) -> bool:
        """Whether the step replayed a CUDA graph."""
        ...

    @property
    def gap(self) -> float | None:
        """The seconds that the device was idle between the previous step and this one, which has ended.

        `None` if only the host's clock can tell.
        """
        ...


@dataclass(frozen=True)
class FinishedStep:
    """A step that was already computed by its launch."""

    sampled: Sampled
    gap: float | None = None
    replayed: bool = False

    def wait(self) -> Sampled:
        """See LaunchedStep."""
        return self.sampled
