"""What an engine tells the transfer threads of its ranks: rank 0's own through a queue, the others' as msgpack."""

import msgspec

from kvasir_engine.connector.sender import Key
from kvasir_engine.protocol import Endpoint, Lease, Loan


class Command(msgspec.Struct, frozen=True, tag_field="t", tag=str.lower):
    """Base of the commands."""


class Grant(Command, frozen=True):
    """The ranks of `to` may write `tokens` (0: all) into the pages of `lease`, until it expires or ends."""

    lease: Lease
    to: Endpoint
    tokens: int


class Revoke(Command, frozen=True):
    """The request of a lease of ours was aborted."""

    lease: int


class Open(Command, frozen=True):
    """Begin to write under another worker's lease."""

    to: Endpoint
    lease: Lease


class Withdraw(Command, frozen=True):
    """Write no more under the lease."""

    key: Key
    reason: str


class Lend(Command, frozen=True):
    """`to` may read the pages of `loan` until it says that it is done, or is dead. `Revoke` ends a loan too."""

    loan: Loan
    to: Endpoint


class Read(Command, frozen=True):
    """Begin to read under a loan of another worker."""

    to: Endpoint
    loan: Loan


AnyCommand = Grant | Revoke | Open | Withdraw | Lend | Read
