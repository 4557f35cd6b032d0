"""Compiles grammars for one vocabulary with llguidance, and caches them."""

import json
import threading
from collections import OrderedDict
from concurrent.futures import Future

import numpy as np
from llguidance import LLMatcher

from kvasir_engine.grammar.base import GrammarBusy, GrammarError
from kvasir_engine.grammar.faults import fault
from kvasir_engine.grammar.json_schema import checked_schema
from kvasir_engine.grammar.lark import to_lark
from kvasir_engine.grammar.limits import parser_limits
from kvasir_engine.grammar.matcher import GuidanceGrammar
from kvasir_engine.grammar.tokens import GrammarTokens
from kvasir_engine.grammar.vocabulary import Vocabulary
from kvasir_engine.protocol import Grammar

MOST_KEPT = 256
MOST_KEPT_CHARACTERS = 8 * 2**20
"""The bound on the sources of cached grammars; a compiled grammar is some ten times as large."""
AT_ONCE = 2
PATIENCE_SECONDS = 30.0


class GuidanceCompiler:
    """See GrammarCompiler. Drops the least recently used grammars; compiles each grammar once at a time.

    llguidance releases the GIL while it compiles. `patience`: seconds that a caller waits for its turn.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        kept: int = MOST_KEPT,
        characters: int = MOST_KEPT_CHARACTERS,
        at_once: int = AT_ONCE,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        self._tokens = GrammarTokens(vocabulary)
        self._most = kept
        self._most_characters = characters
        self._patience = patience
        self._turns = threading.BoundedSemaphore(at_once)
        self._lock = threading.Lock()
        self._kept: OrderedDict[Grammar, GuidanceGrammar] = OrderedDict()
        self._characters = 0
        self._running: dict[Grammar, Future[GuidanceGrammar]] = {}

    def compile(self, grammar: Grammar) -> GuidanceGrammar:
        """Raises GrammarError and GrammarBusy."""
        with self._lock:
            if grammar in self._kept:
                self._kept.move_to_end(grammar)
                return self._kept[grammar]
            running = self._running.get(grammar)
            mine: Future[GuidanceGrammar] | None = None
            if running is None:
                running = mine = self._running[grammar] = Future()
        if mine is not None:
            self._run(grammar, mine)
        try:
            return running.result(self._patience)
        except TimeoutError:
            raise GrammarBusy("a grammar is being compiled") from None

    def _run(self, grammar: Grammar, mine: "Future[GuidanceGrammar]") -> None:
        try:
            if not self._turns.acquire(timeout=self._patience):
                raise GrammarBusy("too many grammars are being compiled")
            try:
                compiled = self._compiled(grammar)
            finally:
                self._turns.release()
        except BaseException as error:
            with self._lock:
                del self._running[grammar]
            mine.set_exception(error)
            return
        with self._lock:
            del self._running[grammar]
            self._keep(grammar, compiled)
        mine.set_result(compiled)

    def _keep(self, grammar: Grammar, compiled: GuidanceGrammar) -> None:
        self._kept[grammar] = compiled
        self._characters += len(grammar.source)
        while len(self._kept) > self._most or self._characters > self._most_characters:
            dropped, _ = self._kept.popitem(last=False)
            self._characters -= len(dropped.source)

    def _compiled(self, grammar: Grammar) -> GuidanceGrammar:
        lark = to_lark(grammar, self._tokens.special)
        begin = LLMatcher(self._tokens.library, lark, log_level=0, limits=parser_limits())
        if begin.is_error():
            schema = json.loads(checked_schema(grammar.source)) if grammar.kind == "json_schema" else None
            raise fault(begin.get_error(), grammar, schema)
        compiled = GuidanceGrammar(begin, self._tokens)
        try:
            compiled.matcher().fill_mask(np.zeros(self._tokens.words, np.int32))
        except GrammarError:
            reason = "no text satisfies it, or it is too complex to begin with"
            raise GrammarError("", reason) from None
        return compiled
