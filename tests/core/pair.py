"""A prefill and a decode worker of the simulation, and a router that a test plays."""

from simulation import Network, Worker

from kvasir_engine.core.grammar_service import GrammarService
from kvasir_engine.core.scheduler import Limits
from kvasir_engine.protocol import Delta, Lease, Leased, Reserve, Sampling, Submit

LIMITS = Limits(tokens=12, running=4, page_size=4)
ROUTER, OTHER = 1, 2
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]  # 2 pages and a half


class Pair:
    """A prefill and a decode worker, and what they told the router."""

    def __init__(
        self,
        prefill_pages: int = 12,
        decode_pages: int = 12,
        limits: Limits = LIMITS,
        overlap: bool = False,
        grammars: GrammarService | None = None,
    ) -> None:
        self.network = Network()
        self.prefill = Worker(self.network, "prefill", "p", prefill_pages, limits, overlap, grammars)
        self.decode = Worker(self.network, "decode", "d", decode_pages, limits, overlap, grammars)
        self.tokens: dict[str, dict[int, int]] = {}
        self.failures: dict[str, list[str]] = {}

    def lease(
        self,
        request: str,
        prompt: list[int],
        count: int = 3,
        session: int = ROUTER,
        sampling: Sampling | None = None,
    ) -> Lease:
        """Reserve at decode, and what it leased."""
        reserve = Reserve(
            request, prompt, sampling or Sampling(max_tokens=count), self.prefill.endpoint, "", 0, nonces=True
        )
        self.decode.engine.reserve(session, reserve)
        self.decode.engine.step()
        self.decode.run_commands()
        for frame in self.frames(self.decode, session):
            if isinstance(frame, Leased) and frame.lease is not None:
                return frame.lease
        raise AssertionError("no lease")

    def submit(
        self,
        request: str,
        prompt: list[int],
        lease: Lease,
        count: int = 3,
        session: int = ROUTER,
        sampling: Sampling | None = None,
    ) -> None:
        frame = Submit(request, prompt, sampling or Sampling(max_tokens=count), "", lease, self.decode.endpoint)
        self.prefill.engine.submit(session, frame)

    def begin(self, request: str, prompt: list[int], count: int = 3) -> Lease:
        """A handoff whose first writes are under way."""
        lease = self.lease(request, prompt, count)
        self.submit(request, prompt, lease, count)
        self.prefill.engine.step()
        self.confirm()
        assert self.prefill.writes
        return lease

    def confirm(self) -> None:
        """Prefill asks decode whether it granted what it is to write under, and decode answers."""
        self.prefill.run_commands()
        self.decode.receive_all()
        self.prefill.receive_all()

    def frames(self, worker: Worker, session: int = ROUTER) -> list[Delta | Leased]:
        frames = worker.engine.drain().get(session, [])
        for frame in frames:
            if isinstance(frame, Delta):
                self.tokens.setdefault(frame.id, {}).update(enumerate(frame.tokens, frame.index))
                if frame.failure is not None:
                    self.failures.setdefault(frame.id, []).append(frame.failure.code)
        return frames

    def deliver(self) -> None:
        """All writes end and all messages arrive; no time passes and no engine steps."""
        for _ in range(20):
            for worker in (self.prefill, self.decode):
                worker.run_commands()
                while worker.writes:
                    worker.end_write()
                worker.receive_all()
                worker.take_events()
                worker.check()

    def run(self) -> None:
        """Until nothing is left to do, on a clock that stands still."""
        for _ in range(60):
            for worker in (self.prefill, self.decode):
                worker.engine.step()
                self.deliver()
                self.frames(worker)

    def is_idle(self) -> bool:
        """Both pools hold nothing but what is cached, and nothing is owed."""
        self.prefill.check()
        self.decode.check()
        return self.prefill.quiet() and self.decode.quiet()

    def tokens_of(self, request: str) -> list[int]:
        return [token for _, token in sorted(self.tokens[request].items())]
