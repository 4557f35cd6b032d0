"""What workers tell each other directly, as NIXL notifications: msgpack, versioned by the fingerprint's layout.

`Written` and `Complete` are sent when the writes before them have ended, so they arrive after the bytes. Every
message names the lease and the epoch of the worker that granted it, and has the lease's nonce: agents' names can be
assumed by anybody, the nonce is known to the two workers and their router. 0 is that of a lease without.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from kvasir_engine.bounds import MOST_ITEMS, Count, Nonce, Pages, Small, Text, Token, Word64, Words
from kvasir_engine.protocol import UNREADABLE, Address, BadFrame, TokenLogprobs


class Message(
    msgspec.Struct, frozen=True, tag_field="t", tag=str.lower, omit_defaults=True, forbid_unknown_fields=True
):
    """Base of the notifications. `lease`, `epoch` and `nonce` are as the granting (decode) worker gave them."""

    lease: Count
    epoch: Count


class Complete(Message, frozen=True):
    """Writer to holder: all `pages` pages are written, I write no more; decode from `token` on.

    `tokens`: length of the prompt whose KV is now complete. `token` is the one that prefill sampled at position
    `tokens`, `logprobs` its log-probabilities as on the router's wire.
    """

    tokens: Small
    pages: Small
    token: Token
    logprobs: TokenLogprobs | None = None
    nonce: Nonce = 0


class Written(Message, frozen=True):
    """Writer to holder: layers `layers` (first, end) of the lease's pages from place `first` on are written.

    `digests`: one for each page, over these layers; 0 where digests are off. A page's layers are announced in
    order, and pages after the pages before them.
    """

    first: Small
    layers: tuple[Small, Small]
    digests: Annotated[list[Word64], Meta(min_length=1, max_length=MOST_ITEMS)]
    nonce: Nonce = 0


class Lent(Message, frozen=True):
    """Holder to reader: these are the digests of what is lent, the blocks `pages`, over all layers.

    Blocks and digests are those of what goes from this rank to that one (`layout.py`).
    """

    pages: Pages
    digests: Words
    nonce: Nonce = 0

    def __post_init__(self) -> None:
        if len(self.pages) != len(self.digests):
            raise ValueError(f"digests: {len(self.digests)} of {len(self.pages)} pages")


class Stopped(Message, frozen=True):
    """Writer to holder: I have stopped before the end and will never write under this lease again.

    Reader to holder: I have read what I wanted, or gave up, and read no more.
    """

    reason: Text
    nonce: Nonce = 0


class Ping(Message, frozen=True):
    """Either to the other: answer with `Pong`. `lease` is any that is open between the two."""

    nonce: Nonce = 0


class Pong(Message, frozen=True):
    """I live, and my transfer thread turns. Names the lease, and the nonce, of the `Ping`."""

    nonce: Nonce = 0


class Release(Message, frozen=True):
    """Holder to writer: stop writing, then say so with `Stopped` (also if you never heard of this lease).

    `sender`: whom to answer, for a writer that the prompt has not reached and that knows nobody by this name.
    """

    sender: Address | None = None
    nonce: Nonce = 0


AnyMessage = Complete | Written | Lent | Stopped | Release | Ping | Pong

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: AnyMessage) -> bytes:
    """The message as msgpack."""
    return _encoder.encode(message)


def decode(data: bytes) -> AnyMessage:
    """A message from a peer. Raises BadFrame."""
    try:
        return _decoder.decode(data)
    except UNREADABLE as error:
        raise BadFrame(str(error)) from error
