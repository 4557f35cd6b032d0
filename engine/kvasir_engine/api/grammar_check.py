"""Checks in separate processes, which can be killed, whether a request's grammar can be served."""

import asyncio
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import msgspec

from kvasir_engine.api import grammar_process
from kvasir_engine.api.bounded_process import BoundedProcess, ProcessEnded
from kvasir_engine.api.grammar_process import OUT_OF_TIME
from kvasir_engine.grammar.base import GrammarBusy, GrammarError
from kvasir_engine.grammar.vocabulary import UnfitVocabulary, Vocabulary
from kvasir_engine.protocol import Grammar


@dataclass(frozen=True)
class CheckLimits:
    """The limits of one check: bytes, and `seconds` of CPU time, so that a busy machine refuses no grammar. A check
    that has not ended after `patience` seconds of wall-clock time says nothing of the grammar.
    """

    seconds: float = 10.0
    patience: float = 120.0
    memory: int = 1024 * 2**20


PROCESSES = 2
START_SECONDS = 120.0
MOST_WAITING = 64
MOST_KNOWN = 1024
MOST_KNOWN_CHARACTERS = 8 * 2**20


class GrammarCheck:
    """At most `PROCESSES` of grammar_process.py, started on demand, and as many threads.

    `vocabulary` is called once, at the first grammar: it takes a fraction of a second.
    """

    def __init__(self, vocabulary: Callable[[], Vocabulary], limits: CheckLimits | None = None) -> None:
        self._vocabulary = vocabulary
        self._limits = limits or CheckLimits()
        self._free: queue.LifoQueue[BoundedProcess | None] = queue.LifoQueue()
        for _ in range(PROCESSES):
            self._free.put(None)
        self._threads = ThreadPoolExecutor(PROCESSES, "grammar-check")
        self._used: set[BoundedProcess] = set()
        self._closed = False
        self._waiting = 0
        self._lock = threading.Lock()
        self._known: OrderedDict[Grammar, GrammarError | None] = OrderedDict()
        self._characters = 0

    async def checked(self, grammar: Grammar) -> None:
        """Return when the grammar is known to work. Raises GrammarError, and GrammarBusy."""
        if self.known(grammar):
            return
        if self._waiting >= MOST_WAITING:
            raise GrammarBusy("too many new grammars wait to be compiled")
        self._waiting += 1
        try:
            await asyncio.get_running_loop().run_in_executor(self._threads, self.check, grammar)
        finally:
            self._waiting -= 1

    def known(self, grammar: Grammar) -> bool:
        """Whether the result is cached. Raises GrammarError where the cached result is an error."""
        with self._lock:
            if grammar not in self._known:
                return False
            self._known.move_to_end(grammar)
            error = self._known[grammar]
        if error is not None:
            raise GrammarError(error.part, error.reason)
        return True

    def check(self, grammar: Grammar) -> None:
        """Check the grammar in at most `patience` seconds, besides those of earlier checks.

        Raises GrammarError and GrammarBusy.
        """
        if self.known(grammar):
            return
        error = self._tried(grammar)
        with self._lock:
            if grammar not in self._known:
                self._characters += len(grammar.source)
            self._known[grammar] = error
            while len(self._known) > MOST_KNOWN or self._characters > MOST_KNOWN_CHARACTERS:
                dropped, _ = self._known.popitem(last=False)
                self._characters -= len(dropped.source)
        if error is not None:
            raise error

    def _tried(self, grammar: Grammar) -> GrammarError | None:
        process = used = self._free.get()
        limits = self._limits
        try:
            if process is None:
                vocabulary = grammar_process.described(self._vocabulary())
                process = used = BoundedProcess(grammar_process.__name__, f"{limits.memory}", f"{limits.seconds}")
                self._use(process)
                process.exchange(vocabulary, START_SECONDS)
            else:
                self._use(process)
            answer = process.exchange(msgspec.to_builtins(grammar), limits.patience)
        except UnfitVocabulary as error:
            return GrammarError("", f"this model takes no grammars: {error}")
        except TimeoutError:
            process = None
            raise GrammarBusy(f"a new grammar was not tried within {limits.patience:g} s") from None
        except ProcessEnded as ended:
            process = None
            if self._closed:
                raise GrammarBusy("the server is shutting down") from None
            if ended.code == -OUT_OF_TIME:
                return GrammarError("", f"it is too complex: it takes more than {limits.seconds:g} s of CPU time")
            return GrammarError("", "it is too complex: it takes too much memory")
        except BaseException:
            process = None
            raise
        finally:
            with self._lock:
                if used is not None:
                    self._used.discard(used)
            self._free.put(process)
        return GrammarError(answer["part"], answer["reason"]) if answer else None

    def _use(self, process: BoundedProcess) -> None:
        """Take a process for use, or end it if the check is closed. Raises GrammarBusy then."""
        with self._lock:
            if not self._closed:
                self._used.add(process)
                return
        process.end()
        raise GrammarBusy("the server is shutting down")

    def close(self) -> None:
        """End the processes, those that try a grammar too, and the threads. Idempotent."""
        with self._lock:
            self._closed = True
            for used in self._used:
                used.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in [self._free.get() for _ in range(PROCESSES)]:
            if process is not None:
                process.end()
            self._free.put(None)
