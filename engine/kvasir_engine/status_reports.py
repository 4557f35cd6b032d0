"""What routers and workers say of themselves at `GET /status`, for the operator. Imports nothing heavy."""

import msgspec

from kvasir_engine.rolling_window import Sum

# What changes with the load is measured over the first, what a request costs over the second.
LOAD_SECONDS = 15.0
COST_SECONDS = 300.0


class PairReport(msgspec.Struct, frozen=True):
    """The pairs among a router's ready workers: how many are verified, still to be, and in quarantine.

    `failures` of canaries and whose fingerprints do not fit (`unpaired`): the first few, each in a sentence.
    """

    verified: int = 0
    pending: int = 0
    failed: int = 0
    failures: tuple[str, ...] = ()
    unpaired: tuple[str, ...] = ()


class RouterLoad(msgspec.Struct, frozen=True, rename="camel"):
    """What a router measured over the last `seconds` (LOAD_SECONDS, fewer after its start), and what it has now.

    Of sequences, of which a request has one for each choice: `arrivals`; `ttft` in seconds, without what a request
    was held for; `itl`, the seconds between two tokens. Of the last COST_SECONDS: `decode`, the seconds from the
    first token to the last. `held` requests wait for the first worker. `idle` is for how many seconds there was no
    request, 0 while there is one.
    """

    seconds: float
    arrivals: int
    held: int
    idle: float
    ttft: Sum
    itl: Sum
    decode: Sum


class RouterStatus(msgspec.Struct, frozen=True, rename="camel"):
    """What a router knows of its workers. `reason`: why no request can be served now, empty when one can."""

    draining: bool
    inflight: int
    reason: str
    pairs: PairReport
    load: RouterLoad | None = None  # of an engine that is too old, nothing is known


class WorkerLoad(msgspec.Struct, frozen=True, rename="camel"):
    """What a worker has now, and what its steps cost in the last COST_SECONDS.

    `waiting` are not admitted yet, `running` in the batch, `used_pages` held or leased. `prompts` were computed,
    `busy` is the seconds of all steps meanwhile, `alone` the mean seconds of a step of one token, 0 without any.
    """

    waiting: int
    running: int
    used_pages: int
    pages: int
    prompts: int
    busy: float
    alone: float


class LinkReport(msgspec.Struct, frozen=True, rename="camel"):
    """What a worker's `rank` measured of its link to a `peer`, an agent of NIXL's.

    In bytes a second and seconds a descriptor. `transport` is what carries KV as far as known. `problem` says what
    to look at where that is a tenth of what it should be; empty where it is not, or nobody can say.
    """

    peer: str
    transport: str
    bytes_per_second: int
    descriptor_seconds: float
    layers_a_push: int
    problem: str = ""
    rank: int = 0


class WorkerStatus(msgspec.Struct, frozen=True, rename="camel"):
    """Requests and leases that have not ended, and the seconds that are left when the worker drains."""

    draining: bool
    requests: int
    leases: int
    seconds_left: float | None
    load: WorkerLoad | None = None  # as a router's
    links: tuple[LinkReport, ...] = ()
