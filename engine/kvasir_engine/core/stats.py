"""Counters of an engine since its start."""

from dataclasses import dataclass, field

from kvasir_engine.core.jobs import Job


@dataclass
class TokenCounts:
    """Tokens of requests. Each is counted once, on the worker where it happens, when it has happened.

    Tokens of a prompt that is prepared here, for this worker or another: `computed`, `cached` (in the tree) or
    `read` from another worker. Tokens of a prompt that another worker prepares: `received`, or `skipped` if they
    were here already. Tokens after it: `generated` by sampling, or `forced` by a grammar without a step for each.
    """

    computed: int = 0
    cached: int = 0
    read: int = 0
    received: int = 0
    skipped: int = 0
    generated: int = 0
    forced: int = 0


@dataclass
class Stats:
    """Counters since the start; read by the metrics collector from another thread."""

    requests: TokenCounts = field(default_factory=TokenCounts)
    canaries: TokenCounts = field(default_factory=TokenCounts)
    steps: int = 0
    replayed_steps: int = 0  # of those that computed: CUDA graphs, and what was launched kernel by kernel
    eager_steps: int = 0
    step_seconds: float = 0.0
    idle_seconds: float = 0.0  # the device waited for its next step, while there was work
    preemptions: int = 0
    received_pages: int = 0
    sent_pages: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    rejected_messages: int = 0
    computed_tokens: int = 0
    proofs: dict[str, int] = field(default_factory=dict)  # leases that ended without their tokens, by proof

    def tokens(self, job: Job) -> TokenCounts:
        """The counters for the tokens of a job."""
        return self.canaries if job.canary else self.requests

    def admitted(self, job: Job) -> None:
        """Count the admission of a job, whose sequence has KV up to `computed`. May be repeated after a
        preemption."""
        found = min(job.sequence.computed, job.sequence.prompt) - job.counted
        if found > 0:
            read = min(found, job.sequence.read)
            self.tokens(job).read += read
            self.tokens(job).cached += found - read
            job.counted += found

    def computed(self, job: Job) -> None:
        """Count a step that has computed the job's sequence up to `done`."""
        new = min(job.sequence.done, job.sequence.prompt) - job.counted
        if new > 0:
            self.tokens(job).computed += new
            job.counted += new

    def received(self, job: Job) -> None:
        """Count a prompt whose missing KV another worker has written."""
        self.tokens(job).skipped += job.sequence.computed
        self.tokens(job).received += job.sequence.prompt - job.sequence.computed
        job.counted = job.sequence.prompt
