"""What rank 0 of a worker and its other ranks tell each other: msgpack over two sockets for each rank.

One carries steps, in order, to the rank's main thread; the other carries commands to its transfer thread, and all
that the rank reports. A step is one small message. Sockets and not a broadcast of the group that the ranks compute
with: an idle rank may wait on a socket for ever, its transfer thread can look into one between two polls, and the
end of a process is the end of its sockets.
"""

from typing import TypeVar

import msgspec
import numpy as np
import torch

from kvasir_engine.config import EngineConfig
from kvasir_engine.connector import receiver, sender
from kvasir_engine.connector.commands import AnyCommand
from kvasir_engine.connector.sender import Key, Push
from kvasir_engine.errors import UserError
from kvasir_engine.forward_batch import ForwardBatch
from kvasir_engine.protocol import UNREADABLE, Address, BadFrame, Fingerprint
from kvasir_engine.status_reports import LinkReport


class RankFrame(msgspec.Struct, frozen=True, tag_field="t", tag=str.lower):
    """Base of everything that is sent."""


class Setup(RankFrame, frozen=True):
    """First: which part of the model to load, what the worker was told, and where its ranks meet."""

    rank: int
    address: str
    config: EngineConfig


class Serve(RankFrame, frozen=True):
    """Every rank has loaded. Start a transfer thread for pools of this fingerprint."""

    epoch: int
    fingerprint: Fingerprint


class PushFrame(RankFrame, frozen=True):
    """A push under the lease `key`, whose `number` names it in the rank's report.

    It is for the transfer thread that has obeyed the first `after` commands, which come by another connection.
    """

    key: Key
    after: int
    push: Push


class Copies(RankFrame, frozen=True):
    """Copy pages, (source, target), in order, and report `Copied` if `answer`."""

    pages: list[tuple[int, int]]
    answer: bool


class StepFrame(RankFrame, frozen=True):
    """Copy pages, then compute a batch, and push the layers of some pages as they are computed.

    Positions follow from the lengths. `tokens` [T] and `page_table` [S, width] are int32, row after row. `awaited`
    and `scored` are the batch's; rank 0 lets the others have the `sampled` tokens that it samples after this step
    on a GPU.
    """

    copies: list[tuple[int, int]]
    tokens: bytes
    query_lens: list[int]
    context_lens: list[int]
    page_table: bytes
    pushes: list[PushFrame]
    awaited: tuple[tuple[int, int], ...] = ()
    sampled: int = 0
    scored: tuple[tuple[int, int, int], ...] = ()

    @classmethod
    def of(
        cls, batch: ForwardBatch, copies: list[tuple[int, int]], pushes: list[PushFrame], sampled: int = 0
    ) -> "StepFrame":
        """The frame of a batch."""
        tokens, table = (each.to(torch.int32).numpy().tobytes() for each in (batch.tokens, batch.page_table))
        lengths = batch.query_lens, batch.context_lens
        return cls(copies, tokens, *lengths, table, pushes, batch.awaited, sampled, batch.scored)

    def batch(self) -> ForwardBatch:
        """The batch of the frame."""
        lengths = list(zip(self.context_lens, self.query_lens, strict=True))
        positions = np.concatenate([np.arange(context - new, context) for context, new in lengths])
        table = np.frombuffer(self.page_table, np.int32).reshape(len(lengths), -1)
        return ForwardBatch(
            torch.from_numpy(np.frombuffer(self.tokens, np.int32).astype(np.int64)),
            torch.from_numpy(positions),
            self.query_lens,
            self.context_lens,
            torch.from_numpy(table.astype(np.int64)),
            self.awaited,
            self.scored,
        )


class Stop(RankFrame, frozen=True):
    """End."""


class RankLoaded(RankFrame, frozen=True):
    """The rank has its part of the model and a pool of `pages` pages."""

    pages: int


class RankFailed(RankFrame, frozen=True):
    """The rank cannot go on; it ends."""

    reason: str


class RankReady(RankFrame, frozen=True):
    """The rank's transfer thread runs."""

    address: Address


class Copied(RankFrame, frozen=True):
    """The answer to `Copies` that asked for one."""


class Pushed(msgspec.Struct, frozen=True, tag=True):
    """`sender.Done` of the push with this number."""

    key: Key
    number: int


Reported = receiver.Settled | receiver.Fenced | receiver.Reclaimed | receiver.Rejected | sender.Failed | Pushed


class Report(RankFrame, frozen=True):
    """An event of the rank's transfer thread, and its counters (`TransferStats`) by name.

    `links` are those that it has measured; None where they are as last reported.
    """

    event: Reported
    stats: dict[str, float]
    links: list[LinkReport] | None = None


ToMain = Setup | Serve | StepFrame | Copies | PushFrame | Stop
FromRank = RankLoaded | RankFailed | RankReady | Copied | Report

T = TypeVar("T")

_encoder = msgspec.msgpack.Encoder()
_to_main: msgspec.msgpack.Decoder[ToMain] = msgspec.msgpack.Decoder(ToMain)
_from_rank: msgspec.msgpack.Decoder[FromRank] = msgspec.msgpack.Decoder(FromRank)
_command: msgspec.msgpack.Decoder[AnyCommand] = msgspec.msgpack.Decoder(AnyCommand)


def encode(frame: ToMain | FromRank | AnyCommand) -> bytes:
    """The frame as msgpack."""
    return _encoder.encode(frame)


def decode_to_main(data: bytes) -> ToMain:
    """A frame for a rank's main thread. Raises BadFrame."""
    return _decoded(_to_main, data)


def decode_from_rank(data: bytes) -> FromRank:
    """A frame of a rank's. Raises BadFrame."""
    return _decoded(_from_rank, data)


def decode_command(data: bytes) -> AnyCommand:
    """A frame for a rank's transfer thread. Raises BadFrame."""
    return _decoded(_command, data)


def _decoded(decoder: msgspec.msgpack.Decoder[T], data: bytes) -> T:
    try:
        return decoder.decode(data)
    except (*UNREADABLE, UserError) as error:  # a setting out of its range is the user's error elsewhere
        raise BadFrame(str(error)) from None
