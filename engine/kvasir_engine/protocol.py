"""The frames between router and worker: msgpack over one WebSocket, in order, versioned.

Each side's first frame is `Hello`. A worker answers a hello it cannot serve by closing with a reason. Its unknown
fields are ignored, as it says which versions and capabilities there are; both sides speak the highest version they
share. From then on an unknown field is an error, so neither side sends what the other did not say it knows.
Every number has its range (`bounds.py`), and what is beyond is refused where it is decoded.
Closing the socket aborts everything that was submitted or reserved on it.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from kvasir_engine.bounds import (
    MOST_BAD_WORD_TOKENS,
    MOST_BAD_WORDS,
    MOST_BIASES,
    MOST_GRAMMAR_CHARACTERS,
    MOST_ITEMS,
    MOST_LOGPROBS,
    MOST_PAGE_SIZE,
    MOST_PARTS,
    MOST_PROMPT_LOGPROBS,
    MOST_STOP_IDS,
    MOST_TEMPERATURE,
    MOST_WHITESPACE_CHARACTERS,
    Bias,
    Count,
    Logprob,
    Metadata,
    Name,
    Nonce,
    Pages,
    Penalty,
    Positive,
    Priority,
    Rate,
    Repetition,
    Seconds,
    Seed,
    Share,
    Small,
    Text,
    Token,
    Tokens,
    Word64,
    Words,
)

VERSION = 2
"""The lowest version that is spoken. 2: a lease names its writer."""
NONCES = 3
"""The first version in which leases have nonces, and workers say where they are."""
LATEST = 3
"""The highest."""
ALIVE = "alive"
"""The capability of a worker that says regularly which requests it has, and of a router that listens."""
COUNTS = "counts"
"""The capability of a worker that counts canaries apart, and of a router that takes `Delta.cached`."""
PROCESSORS = "logits_processors"
"""The capability of a worker that takes `Sampling.processors`."""
GRAMMAR = "grammar"
"""The capability of a worker that takes `Sampling.grammar`."""
PROMPT_LOGPROBS = "prompt_logprobs"
"""The capability of a worker that takes `Sampling.prompt_logprobs`."""
LOGPROB_START = "logprob_start"
"""The capability of a worker that takes `Sampling.logprob_start`."""
CAPABILITIES = (ALIVE, COUNTS, PROCESSORS, PROMPT_LOGPROBS, LOGPROB_START)
WORKER_PATH = "/v1/worker"

Role = Literal["prefill", "decode", "both"]
Encryption = Literal["auto", "required", "off"]


class Frame(
    msgspec.Struct, frozen=True, tag_field="t", tag=str.lower, omit_defaults=True, forbid_unknown_fields=True
):
    """Base of everything that travels as a frame of its own."""


class LogitsProcessors(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What changes a token's logit before one is chosen, greedy or drawn; all but `replayed` as vLLM has them.

    `presence_penalty` and `frequency_penalty` are of generated tokens, `repetition_penalty` of the prompt's too.
    The last token of one of `bad_words` never follows the others of it where they were generated. Only
    `allowed_token_ids` are chosen where there are any. The last `replayed` tokens of the request's were generated
    before, elsewhere, and are none of its prompt's own.
    """

    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Repetition = 1.0
    logit_bias: Annotated[list[tuple[Token, Bias]], Meta(max_length=MOST_BIASES)] = []
    bad_words: Annotated[
        list[Annotated[list[Token], Meta(min_length=1, max_length=MOST_BAD_WORD_TOKENS)]],
        Meta(max_length=MOST_BAD_WORDS),
    ] = []
    allowed_token_ids: Annotated[list[Token], Meta(min_length=1, max_length=MOST_ITEMS)] | None = None
    replayed: Small = 0

    def names(self) -> list[str]:
        """The fields that a client has set."""
        plain = LogitsProcessors()
        fields = (field for field in self.__struct_fields__ if field != "replayed")
        return [field for field in fields if getattr(self, field) != getattr(plain, field)]


class Grammar(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What the generated text has to be.

    `source` is a JSON schema, nothing for `json_object`, a regex, a grammar in Lark's or in EBNF's syntax, a JSON
    list of the choices, or the structural tags as JSON. `whitespace` is of JSON: a regex of what may stand between
    its parts, empty for nothing; None: what a model likes, within bounds.
    """

    kind: Literal["json_schema", "json_object", "regex", "lark", "ebnf", "choice", "structural_tag"]
    source: Annotated[str, Meta(max_length=MOST_GRAMMAR_CHARACTERS)] = ""
    whitespace: Annotated[str, Meta(max_length=MOST_WHITESPACE_CHARACTERS)] | None = None


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """How the next token is chosen.

    `temperature` 0 is greedy. Otherwise one uniform a token is drawn from a hash of (`seed`, position of the
    token in the sequence, prompt included) and put through the inverse of the distribution that `top_k` (0: all),
    `top_p` and `min_p` leave; so a continuation needs no generator state. Generation ends at any of
    `stop_token_ids` (once `min_tokens` are out; the stop token is reported) or after `max_tokens`.
    `logprobs`: how many alternatives to report a token, `None` for no logprobs at all; they are of the model's own
    distribution. `prompt_logprobs` asks for the same of the prompt's tokens but the first, or of those from place
    `logprob_start` on; what is behind the token before the first of these is then computed, whatever is cached.
    `processors`, `grammar`, `prompt_logprobs` and `logprob_start` are sent only to a worker with the capability.
    """

    max_tokens: Small
    temperature: Annotated[float, Meta(ge=0.0, le=MOST_TEMPERATURE)] = 0.0
    top_p: Share = 1.0
    top_k: Small = 0
    min_p: Share = 0.0
    seed: Seed = 0
    min_tokens: Small = 0
    stop_token_ids: Annotated[list[Token], Meta(max_length=MOST_STOP_IDS)] = []
    logprobs: Annotated[int, Meta(ge=0, le=MOST_LOGPROBS)] | None = None
    processors: LogitsProcessors | None = None
    grammar: Grammar | None = None
    prompt_logprobs: Annotated[int, Meta(ge=0, le=MOST_PROMPT_LOGPROBS)] | None = None
    logprob_start: Small = 0

    def unscored(self, prompt: int) -> int:
        """How many of the first tokens of a prompt of so many have no log-probability: one at least."""
        return min(prompt, max(1, self.logprob_start))


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of a sampled token and of the `top` alternatives (token id, logprob), best first."""

    logprob: Logprob
    top: Annotated[list[tuple[Token, Logprob]], Meta(max_length=MOST_LOGPROBS)] = []


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of a prompt's token after those before it, its rank (1: the likeliest), and the `top`
    alternatives, best first.
    """

    logprob: Logprob
    rank: Positive
    top: Annotated[list[tuple[Token, Logprob]], Meta(max_length=MOST_PROMPT_LOGPROBS)] = []


HEADS_APART = "pages,layers,kv,heads,tokens,dim"
"""The layout in which a head's tokens of a page are one run of bytes: what other divisions of the KV need."""


class LayerRun(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """So many `layers` that keep of a token `parts` times `heads` rows of `row_bytes` bytes (`kv/spec.py`)."""

    layers: Annotated[int, Meta(ge=1, le=1 << 16)]
    parts: Annotated[int, Meta(ge=1, le=2)]
    heads: Annotated[int, Meta(ge=1, le=1 << 16)]
    row_bytes: Annotated[int, Meta(ge=1, le=1 << 16)]


class Fingerprint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What must agree for one worker's KV to be another's. Engine versions may differ.

    `kv_heads` are the model's. `tensor_parallel` and `page_size` may differ within limits; `connector/layout.py`
    says which bytes are which then. `kv` says what each layer keeps where they are not all alike, K and V of
    `kv_heads` heads; a peer that does not know the field refuses it by name.
    """

    model: Name
    revision: Name
    dtype: Name
    layout: Name
    page_size: Annotated[int, Meta(ge=1, le=MOST_PAGE_SIZE)]
    layers: Annotated[int, Meta(ge=1, le=1 << 16)]
    kv_heads: Annotated[int, Meta(ge=1, le=1 << 16)]
    head_dim: Annotated[int, Meta(ge=1, le=1 << 16)]
    positions: Text
    tensor_parallel: Annotated[int, Meta(ge=1, le=MOST_PARTS)] = 1
    digest: Name = "none"
    kv: Annotated[list[LayerRun], Meta(max_length=1 << 10)] | UnsetType = UNSET

    def __post_init__(self) -> None:
        if self.kv is not UNSET and sum(run.layers for run in self.kv) != self.layers:
            raise ValueError(f"kv: it has {sum(run.layers for run in self.kv)} layers, not {self.layers}")

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
        for heads in {self.kv_heads} if self.kv is UNSET else {run.heads for run in self.kv}:
            if any(heads % ranks and ranks % heads for ranks in (ours, theirs)):
                return f" (one of them neither divides the {heads} KV heads nor is a multiple of them)"
        return None


class Region(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A rank's KV pool as its peers address it: `pages` pages of `page_bytes` bytes from `address` on."""

    address: Word64
    pages: Positive
    page_bytes: Positive
    memory: Literal["DRAM", "VRAM"] = "DRAM"
    device: Small = 0

    def __post_init__(self) -> None:
        if self.address + self.pages * self.page_bytes > 1 << 64:
            raise ValueError("address, pages and page_bytes: the region ends beyond 64 bits")


class Address(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one needs to reach one rank's memory. `metadata` is the NIXL agent's, opaque."""

    agent: Name
    metadata: Metadata
    region: Region


class Endpoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one worker needs to reach another's memory: rank 0's agent, its metadata and region, and the `others`'.

    Rank 0's agent stands for the worker where one name is enough. Page numbers mean the same on all ranks.
    """

    agent: Name
    epoch: Count
    metadata: Metadata
    region: Region
    fingerprint: Fingerprint
    others: Annotated[tuple[Address, ...], Meta(max_length=MOST_PARTS)] = ()

    def __post_init__(self) -> None:
        if self.others and len({self.agent, *(each.agent for each in self.others)}) != 1 + len(self.others):
            raise ValueError("others: two ranks have one agent")

    def agent_of(self, rank: int) -> str:
        """The name of one rank's agent."""
        return self.others[rank - 1].agent if 0 < rank <= len(self.others) else self.agent + f"-{rank}" * (rank > 0)

    def address(self, rank: int) -> Address:
        """The address of one rank."""
        return self.others[rank - 1] if rank else Address(self.agent, self.metadata, self.region)


class Load(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """A worker's load at the end of a step, in requests, tokens and pages.

    Measured and 0 before: `prefill_rate` in tokens a second, `read_rate` of other workers' KV in bytes a second.
    """

    running: Count = 0
    waiting: Count = 0
    queued_tokens: Count = 0
    free_pages: Count = 0
    cached_pages: Count = 0
    leases: Count = 0
    prefill_rate: Rate = 0.0
    read_rate: Rate = 0.0


class Hello(Frame, frozen=True, forbid_unknown_fields=False):
    """First frame of both sides. A router sends only what it speaks and its `epoch` (new at each start).

    Versions `version` to `latest` (0: only that) are spoken, with the `capabilities`. `model` is the name that the
    worker serves under; a router serves one name and refuses workers of another. `place`: workers that say the same
    share a machine and its loopback; one whose `encryption` is required moves KV only there.
    """

    version: Small
    epoch: Count
    role: Role | None = None
    model: Text = ""
    max_length: Small = 0
    max_running: Small = 0
    endpoint: Endpoint | None = None
    draining: bool = False
    latest: Small = 0
    capabilities: Annotated[tuple[Name, ...], Meta(max_length=256)] = ()
    place: Name = ""
    encryption: Encryption = "auto"


class Submit(Frame, frozen=True):
    """Router to worker: generate for `tokens`.

    Without `lease` the worker does it all. With one, the worker (prefill) computes the prompt's KV, pushes what
    the lease asks for to `to`, samples one token and is done. `priority`: see `GenerateRequest`. A `canary` is the
    router's own, and counted apart. `place` is that of `to`; from version 3 on.
    """

    id: Name
    tokens: Tokens
    sampling: Sampling
    salt: Text = ""
    lease: "Lease | None" = None
    to: Endpoint | None = None
    priority: Priority = 0
    canary: bool = False
    place: Name = ""


class Reserve(Frame, frozen=True):
    """Router to decode worker: lease pages for `tokens`, to be written by `writer`.

    If fewer than `threshold` prompt tokens are missing here, the worker prefills them itself and answers
    `Leased` without a lease; the request then runs as if it had been submitted. With `lend_from`, the writer has
    so many of the tokens, and may read the pages that this worker has beyond them. `nonces`: router and writer know
    those of leases; `place` is the writer's. Both from version 3 on.
    """

    id: Name
    tokens: Tokens
    sampling: Sampling
    writer: Endpoint
    salt: Text = ""
    threshold: Small = 0
    lend_from: Small | None = None
    priority: Priority = 0
    canary: bool = False
    nonces: bool = False
    place: Name = ""


class Loan(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """The right of a prefill worker to read some pages of a decode worker, which stay as they are meanwhile.

    `pages[i]` holds tokens `first + i * page_size` on. A read that ends after `seconds` is none. `nonce`: as
    a lease has it, another one.
    """

    id: Count
    epoch: Count
    pages: Pages
    first: Small
    seconds: Seconds
    nonce: Nonce = 0


class Lease(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """The right of one writer to write some pages of one decode worker.

    `pages[i]` is to hold tokens `first + i * page_size` on, with the decode worker's page size, of which `first` is
    a multiple. The writer stops posting `seconds` after it got the lease, by its own clock. It is the worker with
    the agent `writer` in the life `writer_epoch`; any other refuses the lease. `loan`: pages before these that it
    may read first. `nonce`: only the two workers and the router know it, and every word that they exchange about
    the lease has it; 0 where one of the three is of version 2.
    """

    id: Count
    epoch: Count
    pages: Pages
    first: Small
    seconds: Seconds
    writer: Name
    writer_epoch: Count
    loan: Loan | None = None
    nonce: Nonce = 0

    def not_for(self, worker: Endpoint) -> str | None:
        """Why `worker` may not write under this lease; None if it was granted to it, in this life."""
        if (self.writer, self.writer_epoch) == (worker.agent, worker.epoch):
            return None
        granted = f"{self.writer} in epoch {self.writer_epoch}"
        return f"the lease was granted to {granted}, this is {worker.agent} in epoch {worker.epoch}"


class Leased(Frame, frozen=True):
    """Decode worker to router: the answer to `Reserve`."""

    id: Name
    lease: Lease | None = None


class Abort(Frame, frozen=True):
    """Router to worker: stop `id`. Idempotent; nothing more comes for that id."""

    id: Name


class Failure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why a request ended without its tokens: a stable snake_case word and a sentence."""

    code: Name
    message: Text


class Delta(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """New tokens of one stream. `index` is the place of `tokens[0]` in the output, from 0.

    A decode worker repeats the token that prefill sampled (index 0), so that the router can do without prefill's
    word and can compare the two. `finish` is `stop` or `length` when generation ended, `handoff` when a
    prefill worker's last write is acknowledged; a `failure` ends the stream too. Where they are asked for,
    `prompt_logprobs` come in order, without tokens, before the first token: `prompt_index` is the place in the
    prompt, from 1, of the token that the first of them is of.
    """

    id: Name
    index: Small = 0
    tokens: Tokens = []
    logprobs: list[TokenLogprobs] | None = None
    finish: Literal["stop", "length", "handoff"] | None = None
    failure: Failure | None = None
    cached: Small = 0
    prompt_index: Small = 0
    prompt_logprobs: Annotated[list[PromptLogprobs], Meta(max_length=MOST_ITEMS)] = []


class Step(Frame, frozen=True):
    """Worker to router: all this router's streams in one frame a step, and the worker's load."""

    deltas: list[Delta]
    load: Load


class CacheEvent(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """A run of whole pages entered (`stored`) or left (`evicted`) this worker's radix tree.

    The hashes are chained (`kv/hashing.py`) and in order: each covers the salt and every token from the beginning,
    so a hash names a prefix.
    """

    stored: Words = []
    evicted: Words = []


class CacheEvents(Frame, frozen=True):
    """Worker to router: what changed in the cache. `seq` grows by one a frame; a gap means lost events.

    With `snapshot`, `events` is the whole content and replaces what was known.
    """

    seq: Count
    events: list[CacheEvent]
    snapshot: bool = False


class Resync(Frame, frozen=True):
    """Router to worker: send a snapshot of the cache."""


class Drain(Frame, frozen=True):
    """Worker to router: give me no new requests; I leave when those I have are done."""


class Alive(Frame, frozen=True):
    """Worker to router, every few seconds while it has any: the ids of this router's requests that have not ended.

    Only for a router that has the capability. A request that the worker lost is missing here.
    """

    requests: list[Name]


ToWorker = Hello | Submit | Reserve | Abort | Resync
ToRouter = Hello | Leased | Step | CacheEvents | Drain | Alive

_encoder = msgspec.msgpack.Encoder()
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_to_router: msgspec.msgpack.Decoder[ToRouter] = msgspec.msgpack.Decoder(ToRouter)


UNREADABLE = (msgspec.MsgspecError, ValueError, RecursionError)
"""What a decoder of msgspec raises for bytes that are no value of its type. What it skips may be nested without
end, too: fields that are unknown, or before the one that says which type it is."""


class BadFrame(ValueError):
    """A frame that cannot be encoded or decoded; the message names the field."""


def encode(frame: ToWorker | ToRouter) -> bytes:
    """The frame as msgpack. Raises BadFrame."""
    try:
        return _encoder.encode(frame)
    except (OverflowError, ValueError, TypeError) as error:
        raise BadFrame(f"{type(frame).__name__} cannot be encoded: {error}") from error


def decode_to_worker(data: bytes) -> ToWorker:
    """A frame that a router sent. Raises BadFrame."""
    try:
        return _to_worker.decode(data)
    except UNREADABLE as error:
        raise BadFrame(str(error)) from error


def decode_to_router(data: bytes) -> ToRouter:
    """A frame that a worker sent. Raises BadFrame."""
    try:
        return _to_router.decode(data)
    except UNREADABLE as error:
        raise BadFrame(str(error)) from error


def agreed_version(ours: Hello, theirs: Hello) -> int | None:
    """The highest protocol version that both sides support, or `None`."""
    best = min(max(ours.version, ours.latest), max(theirs.version, theirs.latest))
    return best if best >= max(ours.version, theirs.version) else None


def version_range(hello: Hello) -> str:
    """The protocol versions that a side supports, as text: "1", or "1 to 3"."""
    latest = max(hello.version, hello.latest)
    return f"{hello.version}" if latest == hello.version else f"{hello.version} to {latest}"
