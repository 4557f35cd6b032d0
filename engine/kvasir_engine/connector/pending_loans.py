"""Loans of this rank whose digests are not computed yet; the reader gets the digests with `Lent`."""

from concurrent.futures import Future
from dataclasses import dataclass

from kvasir_engine.connector.digest_thread import DigestThread, TimedDigests
from kvasir_engine.connector.layout import Cut
from kvasir_engine.protocol import Loan


@dataclass(frozen=True)
class DigestedLoan:
    """A part of a loan, the blocks that `reader` may read, and their digests over all layers."""

    loan: Loan
    reader: str
    blocks: tuple[int, ...]
    digests: TimedDigests


@dataclass(frozen=True)
class _PendingLoan:
    loan: Loan
    reader: str
    blocks: tuple[int, ...]
    digests: "Future[TimedDigests]"


class PendingLoans:
    """Parts of loans whose digests are being computed, or looked up."""

    def __init__(self, digests: DigestThread, layers: int) -> None:
        self._digests = digests
        self._layers = range(layers)
        self._parts: list[_PendingLoan] = []

    def begin(self, loan: Loan, reader: str, blocks: tuple[int, ...], cut: Cut | None) -> None:
        """The reader may read `blocks` of `cut`."""
        self._parts.append(_PendingLoan(loan, reader, blocks, self._digests.written(blocks, self._layers, cut)))

    def done(self) -> list[DigestedLoan]:
        """Those whose digests are there, each once."""
        done = [part for part in self._parts if part.digests.done()]
        self._parts = [part for part in self._parts if part not in done]
        return [
            DigestedLoan(part.loan, part.reader, part.blocks, self._digests.take(part.digests)) for part in done
        ]
