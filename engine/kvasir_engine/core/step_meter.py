"""Measures a worker's steps for the operator's scaling planner. The clock is a parameter."""

import time
from collections.abc import Callable

from kvasir_engine.rolling_window import Window
from kvasir_engine.status_reports import COST_SECONDS


class StepMeter:
    """The meter of one engine. One thread adds, others may read."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._steps = Window(COST_SECONDS, clock)
        self._prompts = Window(COST_SECONDS, clock)
        self._alone = Window(COST_SECONDS, clock)

    def step(self, seconds: float, tokens: int) -> None:
        """Add a step, with its seconds and its number of tokens."""
        self._steps.add(seconds)
        if tokens == 1:  # a lone sequence decodes: nothing is faster
            self._alone.add(seconds)

    def computed(self, prompts: int) -> None:
        """Add prompts that have their first token."""
        if prompts:
            self._prompts.add(count=prompts)

    @property
    def prompts(self) -> int:
        """The prompts computed within the last COST_SECONDS."""
        return self._prompts.sum().count

    @property
    def busy(self) -> float:
        """The seconds of all steps within the last COST_SECONDS."""
        return self._steps.sum().total

    @property
    def alone(self) -> float:
        """The mean seconds of steps with one token; 0 if there were none."""
        return self._alone.sum().mean or 0.0
