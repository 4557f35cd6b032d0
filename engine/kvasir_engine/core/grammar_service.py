"""Threads that compile the grammars of requests before these are admitted, and fill masks while a step computes."""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvasir_engine.core.constraint import Constraint
from kvasir_engine.grammar.base import CompiledGrammar, GrammarBusy, GrammarCompiler, GrammarError
from kvasir_engine.protocol import Grammar, Sampling
from kvasir_engine.sampling.token_history import TokenHistory

COMPILING_AT_ONCE = 2
MOST_COMPILING = 256
"""Requests whose grammars are compiled or wait for it; more are refused as overload."""
MASK_THREADS = 4
ROWS_A_THREAD = 8
"""Masks of a step that are worth a thread of their own."""

Compilation = CompiledGrammar | GrammarError | GrammarBusy
"""What comes of compiling."""
Compiled = Callable[[Compilation, float], None]
"""Hears what came of a compilation, and the seconds that its request waited for it."""


@dataclass
class GrammarStats:
    """Counters since the start: grammars that requests waited for, and the seconds that they did."""

    compiled: int = 0
    compile_seconds: float = 0.0


class FilledMask:
    """The mask of one row, when its thread has filled it."""

    def __init__(self, filled: "Future[list[NDArray[np.int32]]]", place: int) -> None:
        self._filled = filled
        self._place = place

    def words(self) -> NDArray[np.int32]:
        """Waits for it."""
        return self._filled.result()[self._place]


class GrammarService:
    """Of one engine. `jump`: forced text costs no step a token."""

    def __init__(self, compiler: GrammarCompiler, vocab: int, jump: bool = True) -> None:
        self._compiler = compiler
        self._vocab = vocab
        self._jump = jump
        self._compilers = ThreadPoolExecutor(COMPILING_AT_ONCE, "kvasir-grammar")
        self._fillers = ThreadPoolExecutor(min(MASK_THREADS, os.cpu_count() or 1), "kvasir-masks")
        self.compiling = 0
        self.stats = GrammarStats()

    def compile(self, grammar: Grammar, done: Compiled) -> bool:
        """Compile; `done` hears of it, on any thread. False: too many wait already.

        Whoever heard of it says so with `compiled`, on the thread that called this.
        """
        if self.compiling >= MOST_COMPILING:
            return False
        self.compiling += 1
        self._compilers.submit(self._compile, grammar, done, time.monotonic())
        return True

    def compiled(self, seconds: float) -> None:
        """One less waits, which it did for so long."""
        self.compiling -= 1
        self.stats.compiled += 1
        self.stats.compile_seconds += seconds

    def _compile(self, grammar: Grammar, done: Compiled, began: float) -> None:
        try:
            found: Compilation = self._compiler.compile(grammar)
        except (GrammarError, GrammarBusy) as error:
            found = error
        except Exception as error:
            found = GrammarError("", f"it cannot be compiled: {type(error).__name__}: {error}")
        done(found, time.monotonic() - began)

    def constraint(self, compiled: CompiledGrammar, sampling: Sampling, history: TokenHistory | None) -> Constraint:
        """For a sequence at its beginning."""
        return Constraint(compiled.matcher(), self._jump, self._vocab, sampling, history)

    def masks(self, constraints: Sequence[Constraint]) -> list[FilledMask]:
        """Begin to fill the masks of some sequences' next tokens."""
        found: list[FilledMask] = []
        for start in range(0, len(constraints), ROWS_A_THREAD):
            some = constraints[start : start + ROWS_A_THREAD]
            filled = self._fillers.submit(_fill, some)
            found += [FilledMask(filled, place) for place in range(len(some))]
        return found

    def close(self) -> None:
        """End the threads; what they do is waited for."""
        self._compilers.shutdown(cancel_futures=True)
        self._fillers.shutdown(cancel_futures=True)


def _fill(constraints: Sequence[Constraint]) -> list[NDArray[np.int32]]:
    return [each.fill() for each in constraints]
