"""What routers and workers say of themselves at `GET /status`, for the operator. Imports nothing heavy."""

import msgspec


class PairReport(msgspec.Struct, frozen=True):
    """The pairs among a router's ready workers: how many are verified, still to be, and in quarantine.

    `failures` of canaries and whose fingerprints do not fit (`unpaired`): the first few, each in a sentence.
    """

    verified: int = 0
    pending: int = 0
    failed: int = 0
    failures: tuple[str, ...] = ()
    unpaired: tuple[str, ...] = ()


class RouterStatus(msgspec.Struct, frozen=True, rename="camel"):
    """What a router knows of its workers. `reason`: why no request can be served now, empty when one can."""

    draining: bool
    inflight: int
    reason: str
    pairs: PairReport


class WorkerStatus(msgspec.Struct, frozen=True, rename="camel"):
    """Requests and leases that have not ended, and the seconds that are left when the worker drains."""

    draining: bool
    requests: int
    leases: int
    seconds_left: float | None
