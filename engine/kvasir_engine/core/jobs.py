"""Requests of the engine by what this worker computes: everything, only the prompt, or all but the prompt."""

from dataclasses import dataclass, field

from kvasir_engine.connector.sender import Key
from kvasir_engine.core.sequence import Sequence
from kvasir_engine.protocol import Endpoint, Lease, Reserve, Submit

JobId = tuple[int, str]  # session, the request's id in it


@dataclass(eq=False, slots=True)
class Job:
    """A request whose prompt and tokens are computed here. The other kinds have further fields."""

    session: int
    sequence: Sequence
    canary: bool = False
    came: float = 0.0  # by the engine's clock
    compiling: bool = False  # its grammar is, before the prompt is admitted
    admitted: bool = False  # once: it has waited for its first step, or lease, no longer
    counted: int = 0  # tokens of the prompt whose KV's origin is counted

    @property
    def id(self) -> JobId:
        """The session, and the request's id in it."""
        return self.session, self.sequence.id

    @property
    def admissible(self) -> bool:
        """Whether the scheduler may admit it: it does not wait for a grammar or a read."""
        return not self.compiling

    @property
    def untouched(self) -> bool:
        """Whether no step uses its pages, although it is not in the queue."""
        return self.compiling


@dataclass(eq=False, slots=True, kw_only=True)
class PrefillJob(Job):
    """A request whose prompt is computed here; its KV goes to the worker `to`, which decodes it, under `lease`."""

    to: Endpoint
    lease: Lease
    reading: Key | None = None  # the loan that is read under before the prompt is admitted
    handed_off: bool = False  # the prompt is computed, and the pages are the lease's to read

    @property
    def key(self) -> Key:
        """The lease's key in pushes."""
        return self.to.agent, self.lease.id

    @property
    def admissible(self) -> bool:
        """See Job."""
        return self.reading is None and not self.compiling

    @property
    def untouched(self) -> bool:
        """See Job."""
        return self.compiling or self.handed_off or self.reading is not None


@dataclass(eq=False, slots=True, kw_only=True)
class DecodeJob(Job):
    """A request that is decoded here. `writer` computes its prompt, unless fewer than `threshold` tokens are
    missing here.
    """

    writer: Endpoint
    threshold: int = 0
    lend_from: int | None = None  # tokens that the writer has; what we have beyond it may read
    nonces: bool = False  # the writer and the router know the nonces of leases
    lease: Lease | None = None  # that the writer has, or had
    leased: list[int] = field(default_factory=list)  # its pages, until they are settled, reclaimed or fenced
    loan: int | None = None

    @property
    def untouched(self) -> bool:
        """See Job."""
        return self.compiling or bool(self.leased)


def job_of(frame: Submit | Reserve, session: int, sequence: Sequence, came: float) -> Job:
    """The job of a router's frame, whose prompt is `sequence`."""
    match frame:
        case Reserve():
            return DecodeJob(
                session,
                sequence,
                frame.canary,
                came,
                writer=frame.writer,
                threshold=frame.threshold,
                lend_from=frame.lend_from,
                nonces=frame.nonces,
            )
        case Submit(to=Endpoint() as to, lease=Lease() as lease):
            return PrefillJob(session, sequence, frame.canary, came, to=to, lease=lease)
        case _:
            return Job(session, sequence, frame.canary, came)
