"""A step of a model that was launched: what its engine waits for."""

from dataclasses import dataclass
from typing import Protocol

from kvasir_engine.sampling.sampler import Sampled


class LaunchedStep(Protocol):
    """One batch on its way through the model."""

    def wait(self) -> Sampled:
        """The sampled tokens, when the step has written all and told of each layer. Raises what failed."""
        ...

    @property
    def replayed(self) -> bool:
        """Whether the step replayed a CUDA graph."""
        ...

    @property
    def gap(self) -> float | None:
        """Seconds that the device had nothing to do between the step before and this one, once it has ended.

        None where only the host's clock says.
        """
        ...


@dataclass(frozen=True)
class FinishedStep:
    """One that was computed when it was launched."""

    sampled: Sampled
    gap: float | None = None
    replayed: bool = False

    def wait(self) -> Sampled:
        """See LaunchedStep."""
        return self.sampled
