"""The parts of loans that one rank reads under, and the digests that came with them: pure."""

from collections import OrderedDict
from dataclasses import dataclass, field

from kvasir_engine.connector.sender import Key, Push

LOANS, BLOCKS = 1024, 1 << 20
"""Loans, and blocks of them, whose digests are kept until the prompt comes."""


@dataclass
class _Read:
    digests: dict[int, int] | None
    nonce: int = 0
    waiting: list[Push] = field(default_factory=list)


class _EarlyDigests:
    """Digests of loans that nobody reads yet, by the nonce that came with them: another's is not the prompt's."""

    def __init__(self) -> None:
        self._lent: OrderedDict[tuple[Key, int], dict[int, int]] = OrderedDict()
        self._blocks = 0

    def put(self, part: Key, nonce: int, digests: dict[int, int]) -> None:
        """Keep these; the oldest go where there are too many."""
        self.take(part, nonce)
        self._lent[part, nonce] = digests
        self._blocks += len(digests)
        while len(self._lent) > LOANS or self._blocks > BLOCKS:
            self._blocks -= len(self._lent.popitem(last=False)[1])

    def take(self, part: Key, nonce: int) -> dict[int, int] | None:
        """Those of a loan, which are forgotten."""
        digests = self._lent.pop((part, nonce), None)
        self._blocks -= len(digests or ())
        return digests


class LoanReads:
    """Reads under loans. A read waits until its digests have arrived."""

    def __init__(self) -> None:
        self._reads: dict[Key, _Read] = {}
        # What peers of this worker say, and apart from it what anybody says: the one never takes the other's place.
        self._early = {True: _EarlyDigests(), False: _EarlyDigests()}

    def __contains__(self, part: Key) -> bool:
        return part in self._reads

    def open(self, part: Key, nonce: int = 0) -> None:
        """Begin to read under `part`."""
        self._reads[part] = _Read(self._take(part, nonce), nonce)

    def lent(self, part: Key, digests: dict[int, int], nonce: int = 0, known: bool = True) -> list[Push] | None:
        """The digests of what is lent, by block of the lender's. Returns the pushes that waited for them.

        None: the nonce is not the loan's. `known`: a router has named the lender.
        """
        read = self._reads.get(part)
        if read is not None and read.nonce != nonce:
            return None
        if read is None:
            self._early[known].put(part, nonce, digests)
            return []
        read.digests, waiting = digests, read.waiting
        read.waiting = []
        return waiting

    def waits(self, part: Key, push: Push) -> bool:
        """Whether `push` has to wait for the digests; `lent` returns it then."""
        read = self._reads.get(part)
        if read is None or read.digests is not None:
            return False
        read.waiting.append(push)
        return True

    def wrong(self, part: Key, push: Push, digests: list[int]) -> int:
        """How many of the blocks that came with `push`, with these digests, are not what was lent."""
        known = self._reads[part].digests or {}
        return sum(known.get(block) != digest for block, digest in zip(push.remote, digests, strict=True))

    def close(self, part: Key) -> None:
        """The part has ended. Idempotent."""
        read = self._reads.pop(part, None)
        if read is not None:
            self._take(part, read.nonce)

    def _take(self, part: Key, nonce: int) -> dict[int, int] | None:
        found = [early.take(part, nonce) for early in self._early.values()]
        return next((digests for digests in found if digests is not None), None)
