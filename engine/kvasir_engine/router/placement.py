"""Which workers a prompt goes to: least work, longest known prefix. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvasir_engine.protocol import Fingerprint, Role

# One running sequence slows a worker's next requests about as much as this many queued prompt tokens.
RUNNING_TOKENS = 32
# Moving a token's KV costs this share of computing it.
TRANSFER_SHARE = 0.05


@dataclass(frozen=True)
class Candidate:
    """A worker that could take the prompt: its load in tokens and requests, and how much of the prompt it has.

    `refuses`: names of the prefill workers that may not write to it now.
    """

    name: str
    role: Role
    fingerprint: Fingerprint
    queued_tokens: int
    requests: int
    cached_tokens: int
    refuses: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Placement:
    """`decode` generates; `prefill`, when there is one, computes the prompt's KV for it."""

    decode: Candidate
    prefill: Candidate | None = None


def _busy(candidate: Candidate) -> float:
    return candidate.queued_tokens + RUNNING_TOKENS * candidate.requests


def place(prompt_tokens: int, candidates: Sequence[Candidate], threshold: int) -> Placement | None:
    """The placement with the least estimated work before the first token; `None` when nothing can decode.

    A decode worker that lacks fewer than `threshold` tokens, or that no prefill worker can pair with, takes the
    prompt alone. Of equals the first in `candidates` wins.
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
            options = [
                (arriving + _busy(writer) + prompt_tokens - writer.cached_tokens, Placement(decode, writer))
                for writer in writers
            ]
        for option in options:
            if best is None or option[0] < best[0]:
                best = option
    return None if best is None else best[1]
