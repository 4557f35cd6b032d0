"""The process that tries a grammar before a worker compiles it, with little time and memory: clients write
grammars.

Its protocol is that of template_process.py. The first message is the vocabulary, each further one a grammar, which
it compiles and walks through briefly.
"""

import os
import resource
import signal
import sys
import time
from typing import Any

import msgspec
import numpy as np

from kvasir_engine.api.template_process import allow_memory, read, write
from kvasir_engine.grammar.base import GrammarError
from kvasir_engine.grammar.compiler import GuidanceCompiler
from kvasir_engine.grammar.matcher import GuidanceMatcher
from kvasir_engine.grammar.vocabulary import Vocabulary
from kvasir_engine.protocol import Grammar

WALK_TOKENS = 64
WALK_SECONDS = 0.25
OUT_OF_TIME = signal.SIGPROF
"""What ends the process where a grammar takes more CPU time than it may, in a library's code too."""
MOST_STEP_SECONDS = 0.5
"""CPU seconds for a token's mask."""


def described(vocabulary: Vocabulary) -> dict[str, Any]:
    """The vocabulary as the first message."""
    return {
        "tokens": [token.decode("latin-1") for token in vocabulary.tokens],
        "special": dict(vocabulary.special),
        "eos": list(vocabulary.eos),
        "size": vocabulary.size,
    }


def _vocabulary(message: dict[str, Any]) -> Vocabulary:
    """The vocabulary. Its texts are encoded byte by byte: the tokenizer's encoding does not matter here."""
    tokens = tuple(token.encode("latin-1") for token in message["tokens"])
    of_byte = {token[0]: place for place, token in enumerate(tokens) if len(token) == 1}
    return Vocabulary(
        tokens,
        message["special"],
        tuple(message["eos"]),
        message["size"],
        lambda text: [of_byte[byte] for byte in text.encode() if byte in of_byte],
    )


def _walk(matcher: GuidanceMatcher, words: int) -> None:
    """Advance some way by random tokens. Raises GrammarError where a step takes too long."""
    random, row = np.random.default_rng(0), np.zeros(words, np.int32)
    ends = time.process_time() + WALK_SECONDS
    for _ in range(WALK_TOKENS):
        begun = time.process_time()
        if matcher.stopped() or begun > ends:
            return
        matcher.fill_mask(row)
        if time.process_time() - begun > MOST_STEP_SECONDS:
            raise GrammarError("", "it is too complex: a token takes too long")
        allowed = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
        matcher.accept(int(random.choice(allowed)))


def _tried(compiler: GuidanceCompiler, message: dict[str, Any], words: int) -> dict[str, str]:
    try:
        _walk(compiler.compile(msgspec.convert(message, Grammar)).matcher(), words)
    except GrammarError as error:
        return {"part": error.part, "reason": error.reason}
    except MemoryError:
        return {"part": "", "reason": "it takes too much memory"}
    except RecursionError:
        return {"part": "", "reason": "it is nested too deeply"}
    return {}


def main() -> None:
    """Serve until stdin ends. `argv`: bytes of memory beyond what the vocabulary takes, and seconds of CPU time for
    each grammar.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's is its parent's to handle
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that a library prints is an answer
    first = read(sys.stdin.buffer)
    if first is None:
        return
    vocabulary = _vocabulary(first)
    compiler = GuidanceCompiler(vocabulary, kept=1)
    allow_memory(int(sys.argv[1]))
    signal.signal(OUT_OF_TIME, signal.SIG_DFL)
    write(answers, {})
    while (message := read(sys.stdin.buffer)) is not None:
        signal.setitimer(signal.ITIMER_PROF, float(sys.argv[2]))
        answer = _tried(compiler, message, -(-vocabulary.size // 32))
        signal.setitimer(signal.ITIMER_PROF, 0)
        write(answers, answer)


if __name__ == "__main__":
    main()
