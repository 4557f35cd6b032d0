"""What a worker measures of its steps, for the operator's scaling planner. The clock is given."""

import time
from collections.abc import Callable

from kvasir_engine.rolling_window import Window
from kvasir_engine.status_reports import COST_SECONDS


class StepMeter:
    """Of one engine. One thread adds, others may read."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._steps = Window(COST_SECONDS, clock)
        self._prompts = Window(COST_SECONDS, clock)
        self._alone = Window(COST_SECONDS, clock)

    def step(self, seconds: float, tokens: int) -> None:
        """A step took so long and computed so many tokens."""
        self._steps.add(seconds)
        if tokens == 1:  # a lone sequence decodes: nothing is faster
            self._alone.add(seconds)

    def computed(self, prompts: int) -> None:
        """So many prompts have their first token."""
        if prompts:
            self._prompts.add(count=prompts)

    @property
    def prompts(self) -> int:
        """Computed within COST_SECONDS."""
        return self._prompts.sum().count

    @property
    def busy(self) -> float:
        """Seconds of all steps within COST_SECONDS."""
        return self._steps.sum().total

    @property
    def alone(self) -> float:
        """Mean seconds of a step of one token; 0 where there was none."""
        return self._alone.sum().mean or 0.0
