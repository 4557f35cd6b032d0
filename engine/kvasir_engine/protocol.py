"""The frames between router and worker: msgpack over one WebSocket, in order, versioned.

Each side's first frame is `Hello`. A worker answers a hello it cannot serve by closing with a reason. Unknown
fields are ignored, so that versions may differ by additions; an incompatible change raises `VERSION`.
Closing the socket aborts everything that was submitted or reserved on it.
"""

from typing import Literal

import msgspec

VERSION = 2
"""2: a lease names its writer."""
WORKER_PATH = "/v1/worker"

Role = Literal["prefill", "decode", "both"]


class Frame(msgspec.Struct, frozen=True, tag_field="t", tag=str.lower, omit_defaults=True):
    """Base of everything that travels as a frame of its own."""


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the next token is chosen.

    `temperature` 0 is greedy. Otherwise one uniform a token is drawn from a hash of (`seed`, position of the
    token in the sequence, prompt included) and put through the inverse of the distribution that `top_k` (0: all),
    `top_p` and `min_p` leave; so a continuation needs no generator state. Generation ends at any of
    `stop_token_ids` (once `min_tokens` are out; the stop token is reported) or after `max_tokens`.
    `logprobs`: how many alternatives to report a token, `None` for no logprobs at all.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    min_tokens: int = 0
    stop_token_ids: list[int] = []
    logprobs: int | None = None


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of a sampled token and of the `top` alternatives (token id, logprob), best first."""

    logprob: float
    top: list[tuple[int, float]] = []


HEADS_APART = "pages,layers,kv,heads,tokens,dim"
"""The layout in which a head's tokens of a page are one run of bytes: what other divisions of the KV need."""


class Fingerprint(msgspec.Struct, frozen=True):
    """What must agree for one worker's KV to be another's. Engine versions may differ.

    `kv_heads` are the model's. `tensor_parallel` and `page_size` may differ within limits; `transfer/layout.py`
    says which bytes are which then.
    """

    model: str
    revision: str
    dtype: str
    layout: str
    page_size: int
    layers: int
    kv_heads: int
    head_dim: int
    positions: str
    tensor_parallel: int = 1
    digest: str = "none"

    def mismatch(self, other: "Fingerprint") -> str | None:
        """The first field by which the two cannot pair, as `field: ours, theirs`; `None` when they can."""
        for field in self.__struct_fields__:
            ours, theirs = getattr(self, field), getattr(other, field)
            if ours == theirs:
                continue
            why = self._unmovable(field, ours, theirs) if field in ("page_size", "tensor_parallel") else ""
            if why is not None:
                return f"{field}: {ours!r}, {theirs!r}{why}"
        return None

    def _unmovable(self, field: str, ours: int, theirs: int) -> str | None:
        """Why KV cannot move between two numbers of ranks, or two page sizes, that are not the same."""
        if self.layout != HEADS_APART:
            return f" (the layout {self.layout} moves between equal ones only)"
        if field == "page_size":
            return " (neither is a multiple of the other)" if max(ours, theirs) % min(ours, theirs) else None
        if all(self.kv_heads % ranks == 0 or ranks % self.kv_heads == 0 for ranks in (ours, theirs)):
            return None
        return f" (one of them neither divides the {self.kv_heads} KV heads nor is a multiple of them)"


class Region(msgspec.Struct, frozen=True):
    """A rank's KV pool as its peers address it: `pages` pages of `page_bytes` bytes from `address` on."""

    address: int
    pages: int
    page_bytes: int
    memory: Literal["DRAM", "VRAM"] = "DRAM"
    device: int = 0


class Address(msgspec.Struct, frozen=True):
    """What one needs to reach one rank's memory. `metadata` is the NIXL agent's, opaque."""

    agent: str
    metadata: bytes
    region: Region


class Endpoint(msgspec.Struct, frozen=True):
    """What one worker needs to reach another's memory: rank 0's agent, its metadata and region, and the `others`'.

    Rank 0's agent stands for the worker where one name is enough. Page numbers mean the same on all ranks.
    """

    agent: str
    epoch: int
    metadata: bytes
    region: Region
    fingerprint: Fingerprint
    others: tuple[Address, ...] = ()

    def agent_of(self, rank: int) -> str:
        """The name of one rank's agent."""
        return self.others[rank - 1].agent if 0 < rank <= len(self.others) else self.agent + f"-{rank}" * (rank > 0)

    def address(self, rank: int) -> Address:
        """The address of one rank."""
        return self.others[rank - 1] if rank else Address(self.agent, self.metadata, self.region)


class Load(msgspec.Struct, frozen=True, omit_defaults=True):
    """A worker's load at the end of a step, in requests, tokens and pages.

    Measured and 0 before: `prefill_rate` in tokens a second, `read_rate` of other workers' KV in bytes a second.
    """

    running: int = 0
    waiting: int = 0
    queued_tokens: int = 0
    free_pages: int = 0
    cached_pages: int = 0
    leases: int = 0
    prefill_rate: float = 0.0
    read_rate: float = 0.0


class Hello(Frame, frozen=True):
    """First frame of both sides. A router sends only `version` and its `epoch` (new at each start).

    `model` is the name that the worker serves under; a router serves one name and refuses workers of another.
    """

    version: int
    epoch: int
    role: Role | None = None
    model: str = ""
    max_length: int = 0
    max_running: int = 0
    endpoint: Endpoint | None = None
    draining: bool = False


class Submit(Frame, frozen=True):
    """Router to worker: generate for `tokens`.

    Without `lease` the worker does it all. With one, the worker (prefill) computes the prompt's KV, pushes what
    the lease asks for to `to`, samples one token and is done. `priority`: see `GenerateRequest`. A `canary` is the
    router's own, and counted apart.
    """

    id: str
    tokens: list[int]
    sampling: Sampling
    salt: str = ""
    lease: "Lease | None" = None
    to: Endpoint | None = None
    priority: int = 0
    canary: bool = False


class Reserve(Frame, frozen=True):
    """Router to decode worker: lease pages for `tokens`, to be written by `writer`.

    If fewer than `threshold` prompt tokens are missing here, the worker prefills them itself and answers
    `Leased` without a lease; the request then runs as if it had been submitted. With `lend_from`, the writer has
    so many of the tokens, and may read the pages that this worker has beyond them.
    """

    id: str
    tokens: list[int]
    sampling: Sampling
    writer: Endpoint
    salt: str = ""
    threshold: int = 0
    lend_from: int | None = None
    priority: int = 0
    canary: bool = False


class Loan(msgspec.Struct, frozen=True):
    """The right of a prefill worker to read some pages of a decode worker, which stay as they are meanwhile.

    `pages[i]` holds tokens `first + i * page_size` on. A read that ends after `seconds` is none.
    """

    id: int
    epoch: int
    pages: list[int]
    first: int
    seconds: float


class Lease(msgspec.Struct, frozen=True):
    """The right of one writer to write some pages of one decode worker.

    `pages[i]` is to hold tokens `first + i * page_size` on, with the decode worker's page size, of which `first` is
    a multiple. The writer stops posting `seconds` after it got the lease, by its own clock. It is the worker with
    the agent `writer` in the life `writer_epoch`; any other refuses the lease. `loan`: pages before these that it
    may read first.
    """

    id: int
    epoch: int
    pages: list[int]
    first: int
    seconds: float
    writer: str
    writer_epoch: int
    loan: Loan | None = None

    def not_for(self, worker: Endpoint) -> str | None:
        """Why `worker` may not write under this lease; None if it was granted to it, in this life."""
        if (self.writer, self.writer_epoch) == (worker.agent, worker.epoch):
            return None
        granted = f"{self.writer} in epoch {self.writer_epoch}"
        return f"the lease was granted to {granted}, this is {worker.agent} in epoch {worker.epoch}"


class Leased(Frame, frozen=True):
    """Decode worker to router: the answer to `Reserve`."""

    id: str
    lease: Lease | None = None


class Abort(Frame, frozen=True):
    """Router to worker: stop `id`. Idempotent; nothing more comes for that id."""

    id: str


class Failure(msgspec.Struct, frozen=True):
    """Why a request ended without its tokens: a stable snake_case word and a sentence."""

    code: str
    message: str


class Delta(msgspec.Struct, frozen=True, omit_defaults=True):
    """New tokens of one stream. `index` is the place of `tokens[0]` in the output, from 0.

    A decode worker repeats the token that prefill sampled (index 0), so that the router can do without prefill's
    word and can compare the two. `finish` is `stop` or `length` when generation ended, `handoff` when a
    prefill worker's last write is acknowledged; a `failure` ends the stream too.
    """

    id: str
    index: int = 0
    tokens: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    finish: Literal["stop", "length", "handoff"] | None = None
    failure: Failure | None = None
    cached: int = 0


class Step(Frame, frozen=True):
    """Worker to router: all this router's streams in one frame a step, and the worker's load."""

    deltas: list[Delta]
    load: Load


class CacheEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """A run of whole pages entered (`stored`) or left (`evicted`) this worker's radix tree.

    The hashes are chained (`kv/hashing.py`) and in order: each covers the salt and every token from the beginning,
    so a hash names a prefix.
    """

    stored: list[int] = []
    evicted: list[int] = []


class CacheEvents(Frame, frozen=True):
    """Worker to router: what changed in the cache. `seq` grows by one a frame; a gap means lost events.

    With `snapshot`, `events` is the whole content and replaces what was known.
    """

    seq: int
    events: list[CacheEvent]
    snapshot: bool = False


class Resync(Frame, frozen=True):
    """Router to worker: send a snapshot of the cache."""


class Drain(Frame, frozen=True):
    """Worker to router: give me no new requests; I leave when those I have are done."""


ToWorker = Hello | Submit | Reserve | Abort | Resync
ToRouter = Hello | Leased | Step | CacheEvents | Drain

_encoder = msgspec.msgpack.Encoder()
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_to_router: msgspec.msgpack.Decoder[ToRouter] = msgspec.msgpack.Decoder(ToRouter)


def encode(frame: ToWorker | ToRouter) -> bytes:
    """The frame as msgpack."""
    return _encoder.encode(frame)


def decode_to_worker(data: bytes) -> ToWorker:
    """A frame that a router sent. Raises msgspec.ValidationError or msgspec.DecodeError."""
    return _to_worker.decode(data)


def decode_to_router(data: bytes) -> ToRouter:
    """A frame that a worker sent. Raises msgspec.ValidationError or msgspec.DecodeError."""
    return _to_router.decode(data)
