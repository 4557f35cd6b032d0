"""Prefill and decode engines through every schedule of steps, messages, aborts, expiries and deaths.

After every event both pools conserve their pages; every token that comes out is the reference's; at the end, when
all is delivered, both pools hold nothing but what is cached.
"""

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from simulation import Network, Worker
from toy import reference

from kvasir_engine.core.scheduler import Limits
from kvasir_engine.kv.pages import Owner
from kvasir_engine.protocol import Delta, Leased, Reserve, Sampling, Submit

LIMITS = Limits(tokens=12, running=4, page_size=4)
ROUTER = 1
TALK = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]


@dataclass
class Stream:
    """A request as its router sees it."""

    id: str
    prompt: list[int]
    sampling: Sampling
    writer: Worker  # the one that is to compute its prompt
    lease: Leased | None = None
    submitted: bool = False
    tokens: dict[int, int] = field(default_factory=dict)
    failure: str = ""
    finished: bool = False
    aborted: bool = False
    handed_off: bool = False

    @property
    def over(self) -> bool:
        return self.finished or self.aborted or bool(self.failure)


class Schedules(RuleBasedStateMachine):
    overlap = False

    @initialize(prefill_pages=st.integers(8, 14), decode_pages=st.integers(8, 14))
    def start(self, prefill_pages: int, decode_pages: int) -> None:
        self.sizes = prefill_pages, decode_pages
        self.network = Network()
        self.prefill = Worker(self.network, "prefill", "p", prefill_pages, LIMITS, self.overlap)
        self.decode = Worker(self.network, "decode", "d", decode_pages, LIMITS, self.overlap)
        self.streams: dict[str, Stream] = {}
        self.begin()

    def begin(self) -> None:
        """Nothing has happened yet."""

    # -- the router

    def reserve(self, prompt: list[int], count: int, threshold: int, lend_from: int | None) -> None:
        stream = Stream(f"r{len(self.streams)}", prompt, Sampling(max_tokens=count), self.prefill)
        self.streams[stream.id] = stream
        frame = Reserve(
            stream.id, prompt, stream.sampling, self.prefill.endpoint, "", threshold, lend_from, nonces=True
        )
        self.decode.engine.reserve(ROUTER, frame)

    @rule(
        start=st.lists(st.integers(0, 2), max_size=9),
        end=st.lists(st.integers(0, 1), min_size=1, max_size=6),
        count=st.integers(1, 6),
        threshold=st.sampled_from([0, 0, 3, 50]),
        lend_from=st.sampled_from([None, 0, 0, 4]),
    )
    def a_request_comes(
        self, start: list[int], end: list[int], count: int, threshold: int, lend_from: int | None
    ) -> None:
        self.reserve(sorted(start) + end, count, threshold, lend_from)

    @rule(
        known=st.integers(5, len(TALK)),
        end=st.lists(st.integers(0, 1), min_size=1, max_size=4),
        count=st.integers(1, 3),
        lend_from=st.sampled_from([0, 0, 4]),
    )
    def a_conversation_goes_on(self, known: int, end: list[int], count: int, lend_from: int) -> None:
        self.reserve(TALK[:known] + end, count, 0, lend_from)

    def collect(self, worker: Worker) -> None:
        for frame in worker.engine.drain().get(ROUTER, []):
            stream = self.streams[frame.id]
            if stream.aborted:
                continue
            if isinstance(frame, Leased):
                stream.lease = frame
                if frame.lease is None:
                    stream.submitted = True
            else:
                self.take(stream, worker, frame)

    def take(self, stream: Stream, worker: Worker, delta: Delta) -> None:
        expected = reference(stream.prompt, stream.sampling.max_tokens)
        for index, token in enumerate(delta.tokens, delta.index):
            assert token == expected[index], f"a wrong token at {index} of {stream.id} from {worker.name}"
            stream.tokens[index] = token
        if delta.failure is not None:
            stream.failure = delta.failure.code
            self.abort(stream)
        if delta.finish in ("stop", "length"):
            assert list(stream.tokens.values()) == expected
            stream.finished = True
            if worker is self.prefill:
                self.decode.engine.abort(ROUTER, stream.id)
        if delta.finish == "handoff":
            stream.handed_off = True

    @precondition(lambda self: any(s.lease and s.lease.lease and not s.submitted for s in self.streams.values()))
    @rule(data=st.data())
    def the_router_submits_to_prefill(self, data: st.DataObject) -> None:
        ready = [s for s in self.streams.values() if s.lease and s.lease.lease and not s.submitted and not s.over]
        if ready:
            stream = data.draw(st.sampled_from(ready))
            self.submit(stream)

    def submit(self, stream: Stream) -> None:
        assert stream.lease is not None
        if stream.writer is not self.prefill:
            self.abort(stream)  # that worker went before the lease was granted; another has no right to it
            return
        stream.submitted = True
        submit = Submit(stream.id, stream.prompt, stream.sampling, "", stream.lease.lease, self.decode.endpoint)
        self.prefill.engine.submit(ROUTER, submit)

    def abort(self, stream: Stream) -> None:
        stream.aborted = True
        self.decode.engine.abort(ROUTER, stream.id)
        self.prefill.engine.abort(ROUTER, stream.id)

    @precondition(lambda self: any(not s.over for s in self.streams.values()))
    @rule(data=st.data())
    def the_client_goes_away(self, data: st.DataObject) -> None:
        self.abort(data.draw(st.sampled_from([s for s in self.streams.values() if not s.over])))

    @rule()
    def the_router_dies(self) -> None:
        for stream in self.streams.values():
            stream.aborted = True
        self.decode.engine.close_session(ROUTER)
        self.prefill.engine.close_session(ROUTER)

    # -- the workers

    @rule(times=st.integers(1, 3), which=st.sampled_from(["prefill", "decode"]))
    def steps(self, times: int, which: str) -> None:
        worker: Worker = getattr(self, which)
        for _ in range(times):
            worker.engine.step()
            self.collect(worker)

    @rule(which=st.sampled_from(["prefill", "decode"]))
    def the_transfer_thread_obeys(self, which: str) -> None:
        worker: Worker = getattr(self, which)
        worker.run_commands()

    @rule(which=st.sampled_from(["prefill", "decode"]))
    def a_message_arrives(self, which: str) -> None:
        worker: Worker = getattr(self, which)
        worker.receive()

    @precondition(lambda self: self.prefill.writes)
    @rule(data=st.data())
    def a_write_ends(self, data: st.DataObject) -> None:
        self.prefill.end_write(data.draw(st.integers(0, len(self.prefill.writes) - 1)))

    @rule(which=st.sampled_from(["prefill", "decode"]))
    def the_engine_learns(self, which: str) -> None:
        worker: Worker = getattr(self, which)
        worker.take_events()
        self.collect(worker)

    @rule(seconds=st.sampled_from([0.3, 70.0]))
    def time_passes(self, seconds: float) -> None:
        self.network.now += seconds
        for worker in (self.prefill, self.decode):
            worker.tick()

    @rule()
    def prefill_dies_and_returns(self) -> None:
        self.network.kill(self.prefill)
        self.prefill = Worker(self.network, "prefill", "p", self.sizes[0], LIMITS, self.overlap)
        for stream in self.streams.values():  # those it had not handed off are lost, and the router aborts them
            if not stream.over and stream.lease is not None and stream.lease.lease is not None:
                self.abort(stream)

    @rule()
    def decode_dies_and_returns(self) -> None:
        self.network.kill(self.decode)
        self.decode = Worker(self.network, "decode", "d", self.sizes[1], LIMITS, self.overlap)
        for stream in self.streams.values():
            if not stream.over:
                stream.aborted = True
                self.prefill.engine.abort(ROUTER, stream.id)

    @invariant()
    def pages_are_conserved(self) -> None:
        if hasattr(self, "network"):
            self.prefill.check()
            self.decode.check()

    def settle(self) -> None:
        for _ in range(400):
            before = (self.prefill.runner.computed, self.decode.runner.computed)
            progressed = False
            for stream in self.streams.values():
                if stream.lease and stream.lease.lease and not stream.submitted and not stream.over:
                    self.submit(stream)
            for worker in (self.prefill, self.decode):
                progressed = worker.engine.step() or progressed
                worker.run_commands()
                worker.tick()
                while worker.writes:
                    worker.end_write()
                worker.receive_all()
                worker.take_events()
                self.collect(worker)
            quiet = (self.prefill.runner.computed, self.decode.runner.computed) == before and not progressed
            if quiet and not any(
                w.events or w.peers_with_messages or w.writes for w in (self.prefill, self.decode)
            ):
                self.network.now += 0.3
                if all(s.over for s in self.streams.values()) and not self.decode.engine.leases.fenced:
                    break

    def teardown(self) -> None:
        """Undisturbed from here, every request ends and both pools hold nothing but what is cached."""
        if not hasattr(self, "network"):
            return
        self.settle()
        for stream in self.streams.values():
            assert stream.over, f"{stream.id} hangs"
        for worker in (self.prefill, self.decode):
            worker.check()
            pool = worker.engine.cache.pool
            assert not worker.engine.jobs
            assert pool.count(Owner.FREE) + pool.count(Owner.CACHED) == pool.size, worker.engine.load()


TestSchedules = Schedules.TestCase
TestSchedules.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)


class Conversations(Schedules):
    """The same from where decode has a conversation that prefill lacks, and two prompts go on from it."""

    def begin(self) -> None:
        self.reserve([*TALK, 0], 1, 50, None)
        self.steps(1, "decode")
        for end in (1, 2):
            self.reserve([*TALK, end], 2, 0, 0)
        self.steps(2, "decode")
        for stream in self.streams.values():
            if stream.lease is not None and stream.lease.lease is not None and not stream.over:
                self.submit(stream)


TestConversations = Conversations.TestCase
TestConversations.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)


class OverlappedSchedules(Schedules):
    """The same with a step in flight whenever anything else happens, on a device as late as it may be."""

    overlap = True


TestOverlappedSchedules = OverlappedSchedules.TestCase
TestOverlappedSchedules.settings = settings(max_examples=80, stateful_step_count=60, deadline=None)


class OverlappedConversations(Conversations):
    """Both."""

    overlap = True


TestOverlappedConversations = OverlappedConversations.TestCase
TestOverlappedConversations.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)


def test_a_prompt_that_decode_computes_after_all_finds_its_pages() -> None:
    """As a handoff it needs fewer pages: the cached one that is held while it is copied is not among them."""
    state = Schedules()
    state.start(prefill_pages=8, decode_pages=13)
    state.a_request_comes(start=[], end=[0], count=1, threshold=3, lend_from=None)
    state.a_request_comes(start=[0] * 8, end=[0] * 5, count=1, threshold=0, lend_from=None)
    state.steps(times=2, which="decode")
    state.a_conversation_goes_on(known=8, end=[0], count=1, lend_from=0)
    state.a_conversation_goes_on(known=12, end=[0], count=1, lend_from=0)
    state.steps(times=1, which="decode")
    state.prefill_dies_and_returns()
    state.a_request_comes(start=[], end=[0] * 5, count=1, threshold=50, lend_from=None)
    state.steps(times=1, which="decode")
    state.teardown()


def test_a_prompt_as_long_as_the_pool_is_computed_again() -> None:
    """All its pages are cached, and there is none to copy the last of them to."""
    state = Schedules()
    state.start(prefill_pages=8, decode_pages=8)
    prompt = [0] * (8 * LIMITS.page_size - 1)
    for _ in range(2):
        state.reserve(prompt, 1, 1000, None)
        state.settle()
    assert [list(each.tokens.values()) for each in state.streams.values()] == [reference(prompt, 1)] * 2
    state.teardown()


def test_a_prompt_waits_until_there_is_room_for_what_is_cached_of_it_too() -> None:
    state = Schedules()
    state.start(prefill_pages=8, decode_pages=8)
    page = LIMITS.page_size
    state.reserve([0] * (4 * page), 1, 1000, None)
    state.settle()  # four pages are cached
    state.reserve([1] * (3 * page), 5, 1000, None)
    state.steps(times=2, which="decode")  # and four are held
    state.reserve([0] * (6 * page), 1, 1000, None)
    state.steps(times=1, which="decode")
    assert len(state.decode.engine.waiting) == 1
    state.settle()
    state.teardown()
    assert all(stream.finished for stream in state.streams.values())
