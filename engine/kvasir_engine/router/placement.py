"""Chooses the workers for a prompt: least work, longest known prefix. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvasir_engine.protocol import Fingerprint, Role

# One running sequence slows a worker's next requests about as much as this many queued prompt tokens.
RUNNING_TOKENS = 32
# Moving a token's KV costs this share of computing it.
TRANSFER_SHARE = 0.05
# What a read costs beside its bytes, in seconds, and its rate until it was measured, in bytes a second.
READ_SECONDS = 0.003
FIRST_READ_RATE = 1e9


@dataclass(frozen=True)
class Candidate:
    """A worker that could take the prompt: its load in tokens and requests, and the tokens of the prompt that it
    has cached.

    `refuses`: names of the prefill workers that may not write to it now. `prefill_rate` in tokens a second and
    `read_rate` in bytes a second are measured, 0 if unknown; `token_bytes`: bytes of KV a token. The last two are
    for one rank.
    """

    name: str
    role: Role
    fingerprint: Fingerprint
    queued_tokens: int
    requests: int
    cached_tokens: int
    refuses: frozenset[str] = frozenset()
    prefill_rate: float = 0.0
    read_rate: float = 0.0
    token_bytes: int = 0


@dataclass(frozen=True)
class Placement:
    """`decode` generates; `prefill`, when there is one, computes the prompt's KV for it.

    With `lend_from`, `prefill` has that many tokens, and reads from `decode` what that has beyond them.
    """

    decode: Candidate
    prefill: Candidate | None = None
    lend_from: int | None = None


def _busy(candidate: Candidate) -> float:
    return candidate.queued_tokens + RUNNING_TOKENS * candidate.requests


def readable(writer: Candidate, decode: Candidate) -> int:
    """Tokens that `decode` has beyond `writer`'s and that `writer` probably reads faster than it computes them.

    `decode` lends whole pages, and `writer` reads whole pages of its own.
    """
    size, theirs = writer.fingerprint.page_size, decode.fingerprint.page_size
    lent = decode.cached_tokens // theirs * theirs
    tokens = (lent // size - writer.cached_tokens // size) * size
    if tokens <= 0:
        return 0
    reading = READ_SECONDS + tokens * writer.token_bytes / (writer.read_rate or FIRST_READ_RATE)
    computing = tokens / writer.prefill_rate if writer.prefill_rate else float("inf")
    return tokens if reading < computing else 0


def place(prompt_tokens: int, candidates: Sequence[Candidate], threshold: int) -> Placement | None:
    """The placement with the least estimated work before the first token; `None` when no worker can decode.

    The prompt stays on the decode worker when that lacks fewer than `threshold` tokens, or when no prefill worker
    can pair with it. Of equal placements the first in `candidates` wins.
    """
    best: tuple[float, Placement] | None = None
    prefills = [each for each in candidates if each.role == "prefill"]
    for decode in candidates:
        if decode.role == "prefill":
            continue
        missing = prompt_tokens - decode.cached_tokens
        writers = [
            each
            for each in prefills
            if each.name not in decode.refuses and each.fingerprint.mismatch(decode.fingerprint) is None
        ]
        options: list[tuple[float, Placement]]
        if missing < threshold or not writers:
            options = [(_busy(decode) + missing, Placement(decode))]
        else:
            arriving = _busy(decode) + TRANSFER_SHARE * missing
            options = []
            for writer in writers:
                read = readable(writer, decode)
                work = prompt_tokens - writer.cached_tokens - read + TRANSFER_SHARE * read
                lend_from = writer.cached_tokens if read else None
                options.append((arriving + _busy(writer) + work, Placement(decode, writer, lend_from)))
        for option in options:
            if best is None or option[0] < best[0]:
                best = option
    return None if best is None else best[1]
