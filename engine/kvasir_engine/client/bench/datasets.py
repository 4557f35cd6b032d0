"""The conversations of a benchmark: random by seed, or read from a ShareGPT file."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from kvasir_engine.errors import UserError

Dataset = Literal["random", "shared-prefix", "multi-turn", "sharegpt"]
CHARACTERS_A_TOKEN = 4
"""Characters a token of English text in common vocabularies, used without a tokenizer."""
MOST_FILE_BYTES = 2 * 2**30
SHORTEST, LONGEST_PROMPT, LONGEST = 4, 1024, 2048
"""Tokens: what of a ShareGPT file is taken, as vLLM's and SGLang's benchmarks take it."""

COMMON = """
time year people way day man thing woman life child world school state family student group country problem hand
part place case week company system program question work government number night point home water room mother
area money story fact month lot right study book eye job word business issue side kind head house service friend
father power hour game line end member law car city community name president team minute idea kid body
information back parent face others level office door health person art war history party result change morning
reason research girl guy moment air teacher force education
"""
WORDS = COMMON.split()
"""Words that most vocabularies have as one token."""

Count = Callable[[str], int]
"""Counts a text's tokens."""


@dataclass(frozen=True)
class Turn:
    """A user's message, and the maximum number of tokens of the answer."""

    text: str
    max_tokens: int


@dataclass(frozen=True)
class Conversation:
    """Consecutive turns; each request has the earlier turns and answers."""

    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class DatasetOptions:
    """`range_ratio` r: lengths are uniform between (1 - r) and (1 + r) times the given ones."""

    dataset: Dataset = "random"
    path: str = ""
    number: int = 100
    input_len: int = 512
    output_len: int = 128
    range_ratio: float = 0.0
    prefix_len: int = 0
    prefixes: int = 1
    turns: int = 1
    seed: int = 0


def conversations(options: DatasetOptions, count: Count | None) -> list[Conversation]:
    """The conversations, always the same for a seed. `count` counts a text's tokens, if there is a tokenizer.

    Raises UserError.
    """
    chance = random.Random(options.seed)
    if options.dataset == "sharegpt":
        return _sharegpt(options, count or estimate, chance)
    prefixes = [_text(chance, options.prefix_len, count) for _ in range(options.prefixes)]
    found = []
    for place in range(options.number):
        turns = []
        for turn in range(options.turns):
            text = _text(chance, _length(chance, options.input_len, options.range_ratio), count)
            begins = turn == 0 and options.prefix_len > 0
            text = f"{prefixes[place % len(prefixes)]} {text}" if begins else text
            turns.append(Turn(text, _length(chance, options.output_len, options.range_ratio)))
        found.append(Conversation(tuple(turns)))
    return found


def estimate(text: str) -> int:
    """A text's estimated number of tokens."""
    return max(1, len(text) // CHARACTERS_A_TOKEN)


def _length(chance: random.Random, length: int, ratio: float) -> int:
    return chance.randint(max(1, int(length * (1 - ratio))), max(1, int(length * (1 + ratio))))


def _text(chance: random.Random, tokens: int, count: Count | None) -> str:
    """A text of so many tokens; without a tokenizer, of so many words that most vocabularies have as one token."""
    if tokens == 0:
        return ""
    words = [chance.choice(WORDS) for _ in range(tokens)]
    if count is None:
        return " ".join(words)
    low, high = 1, len(words)
    while low < high:  # the most words whose tokens are not too many
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count(" ".join(words[:middle])) <= tokens else (low, middle - 1)
    return " ".join(words[:low])


class ShareGptMessage(msgspec.Struct, frozen=True):
    value: str
    sender: str = msgspec.field(name="from", default="")


class ShareGptConversation(msgspec.Struct, frozen=True):
    conversations: list[ShareGptMessage] = []


def _sharegpt(options: DatasetOptions, count: Count, chance: random.Random) -> list[Conversation]:
    """The first question of each conversation; the answer's length is that in the file."""
    path = Path(options.path)
    try:
        if path.stat().st_size > MOST_FILE_BYTES:
            raise UserError(f"--dataset-path {path}: has more than {MOST_FILE_BYTES} bytes")
        entries = msgspec.json.decode(path.read_bytes(), type=list[ShareGptConversation])
    except OSError as error:
        raise UserError(f"--dataset-path {path}: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise UserError(f"--dataset-path {path}: is no ShareGPT file: {error}") from None
    chance.shuffle(entries)
    found: list[Conversation] = []
    for entry in entries:
        if len(found) == options.number:
            break
        if len(entry.conversations) >= 2:
            question, answer = (each.value for each in entry.conversations[:2])
            prompt, output = count(question), count(answer)
            if SHORTEST <= prompt <= LONGEST_PROMPT and output >= SHORTEST and prompt + output <= LONGEST:
                found.append(Conversation((Turn(question, output),)))
    if not found:
        raise UserError(f"--dataset-path {path}: no conversation in it has a suitable length")
    return found
