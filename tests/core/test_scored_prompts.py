"""Each token of a prompt is scored once, after all those before it, wherever and however the prompt is computed."""

import math
from collections.abc import Sequence

import pytest
from pair import LIMITS, PROMPT, ROUTER, Pair
from simulation import Network, Worker
from toy import VOCAB, following, reference

from kvasir_engine.core.engine_thread import MOST_FRAME_SCORES, _shares
from kvasir_engine.core.output_processor import MOST_SCORES
from kvasir_engine.core.scheduler import Limits
from kvasir_engine.protocol import Delta, Leased, PromptLogprobs, Reserve, Sampling, Submit

LONG = [*PROMPT, *reference(PROMPT, 3), *range(20), 7, 7, 1]  # three chunks; three tokens are the likeliest
ASKED = Sampling(3, prompt_logprobs=1)
LIKELY, UNLIKELY = (one - math.log(math.e + VOCAB - 1) for one in (1.0, 0.0))
overlaps = pytest.mark.parametrize("overlap", [False, True])


class Reported:
    """What a router hears of its requests. Each score comes once, in order from `first` on, before all tokens."""

    def __init__(self, first: int = 1) -> None:
        self.first = first
        self.scores: dict[str, list[PromptLogprobs]] = {}
        self.tokens: dict[str, list[int]] = {}
        self.leases: dict[str, Leased] = {}

    def add(self, frames: Sequence[Delta | Leased]) -> None:
        for frame in frames:
            if isinstance(frame, Leased):
                self.leases[frame.id] = frame
                continue
            assert frame.failure is None, frame.failure
            if frame.prompt_logprobs:
                assert not frame.tokens
                assert frame.id not in self.tokens
                known = self.scores.setdefault(frame.id, [])
                assert frame.prompt_index == len(known) + self.first
                known += frame.prompt_logprobs
            if frame.tokens:
                self.tokens.setdefault(frame.id, []).extend(frame.tokens)


def right(prompt: list[int], scores: list[PromptLogprobs], first: int = 1) -> None:
    assert len(scores) == len(prompt) - first
    for place, score in enumerate(scores, first):
        likeliest = following(prompt[:place])
        assert [token for token, _ in score.top] == [likeliest]
        assert score.top[0][1] == pytest.approx(LIKELY)
        hit = prompt[place] == likeliest
        assert score.rank == (1 if hit else 2)
        assert score.logprob == pytest.approx(LIKELY if hit else UNLIKELY)


def ran(
    worker: Worker, requests: dict[str, tuple[list[int], Sampling]], reported: Reported | None = None
) -> Reported:
    reported = reported or Reported()
    for request, (prompt, sampling) in requests.items():
        worker.engine.submit(ROUTER, Submit(request, prompt, sampling))
    for _ in range(400):
        worker.engine.step()
        reported.add(worker.engine.drain().get(ROUTER, []))
        worker.check()
        if not worker.engine.busy:
            return reported
    raise AssertionError("it does not end")


def alone(overlap: bool, pages: int = 24, limits: Limits = LIMITS) -> Worker:
    return Worker(Network(), "both", "b", pages, limits, overlap)


@overlaps
@pytest.mark.parametrize("chunk", [1, 3, 12, 64])
def test_a_prompt_in_chunks_beside_others(overlap: bool, chunk: int) -> None:
    worker = alone(overlap, limits=Limits(tokens=chunk, running=4, page_size=4))
    reported = ran(worker, {"a": (LONG, ASKED), "plain": (PROMPT, Sampling(9)), "b": ([9, *LONG[:20]], ASKED)})
    right(LONG, reported.scores["a"])
    right([9, *LONG[:20]], reported.scores["b"])
    assert "plain" not in reported.scores
    assert reported.tokens["a"] == reference(LONG, 3)
    assert reported.tokens["plain"] == reference(PROMPT, 9)


@overlaps
def test_what_is_cached_is_computed_again_and_cached_for_others(overlap: bool) -> None:
    worker = alone(overlap)
    ran(worker, {"before": (LONG, Sampling(1))})
    reported = ran(worker, {"a": (LONG, ASKED)})
    right(LONG, reported.scores["a"])
    assert worker.engine.stats.requests.cached == 0
    assert worker.engine.stats.requests.computed == 2 * len(LONG)
    ran(worker, {"after": (LONG, Sampling(1))})
    assert worker.engine.stats.requests.cached == len(LONG) - 1


def starting(place: int, count: int = 3) -> Sampling:
    return Sampling(count, prompt_logprobs=1, logprob_start=place)


@overlaps
@pytest.mark.parametrize("place", [0, 1, 2, 16, 17, 18, len(LONG) - 1, len(LONG), 1000])
def test_from_a_place_on_what_is_before_it_is_taken_from_the_cache(overlap: bool, place: int) -> None:
    worker, first = alone(overlap), min(max(1, place), len(LONG))
    cold = ran(worker, {"cold": (LONG, starting(place))}, Reported(first))
    warm = ran(worker, {"warm": (LONG, starting(place))}, Reported(first))
    assert worker.engine.stats.requests.cached == first - 1
    assert worker.engine.stats.requests.computed == 2 * len(LONG) - first + 1
    for reported, request in ((cold, "cold"), (warm, "warm")):
        right(LONG, reported.scores.get(request, []), first)
        assert reported.tokens[request] == reference(LONG, 3)


@overlaps
def test_two_that_begin_alike_compute_the_beginning_once(overlap: bool) -> None:
    worker, reported = alone(overlap), Reported(20)
    finisher = {"a": [*LONG[:20], 3, 4], "b": [*LONG[:20], 5, 6, 7], "c": [*LONG[:20], 8]}
    ran(worker, {name: (prompt, starting(20)) for name, prompt in finisher.items()}, reported)
    for name, prompt in finisher.items():
        right(prompt, reported.scores[name], 20)
        assert reported.tokens[name] == reference(prompt, 3)
    assert worker.engine.stats.requests.cached >= 2 * 16  # whole pages of what is before them


@overlaps
def test_a_preempted_prompt_goes_on_behind_the_place(overlap: bool) -> None:
    worker = alone(overlap, pages=14, limits=Limits(tokens=6, running=4, page_size=4))
    reported = Reported(5)
    requests = {f"r{n}": ([n, *LONG[:9]], starting(5, 16)) for n in range(4)}
    ran(worker, requests, reported)
    assert worker.engine.stats.preemptions > 0
    for request, (prompt, _) in requests.items():
        right(prompt, reported.scores[request], 5)
        assert reported.tokens[request] == reference(prompt, 16)


@overlaps
@pytest.mark.parametrize("place", [0, 6, len(LONG)])
@pytest.mark.parametrize("warm", ["neither", "prefill", "decode"])
def test_from_a_place_on_prefill_tells(overlap: bool, place: int, warm: str) -> None:
    pair = Pair(prefill_pages=24, decode_pages=24, overlap=overlap)
    if warm == "prefill":
        pair.submit("before", LONG[:17], pair.lease("before", LONG[:17]))
        for _ in range(30):
            for worker in (pair.prefill, pair.decode):
                worker.engine.step()
                pair.deliver()
                worker.engine.drain()
        pair.decode.engine.cache.tree.evict(24)
    if warm == "decode":
        ran(pair.decode, {"before": (LONG[:17], Sampling(1))})
    first = min(max(1, place), len(LONG))
    reported = {"p": Reported(first), "d": Reported(first)}
    before = pair.prefill.engine.stats.requests.cached
    lease = pair.lease("a", LONG, sampling=starting(place))
    pair.submit("a", LONG, lease, sampling=starting(place))
    for _ in range(60):
        for key, worker in (("p", pair.prefill), ("d", pair.decode)):
            worker.engine.step()
            pair.deliver()
            reported[key].add(worker.engine.drain().get(ROUTER, []))
    right(LONG, reported["p"].scores.get("a", []), first)
    assert reported["d"].scores == {}
    assert reported["d"].tokens["a"] == reference(LONG, 3)
    if warm == "prefill":
        assert pair.prefill.engine.stats.requests.cached - before == min(first - 1, 17)
    assert pair.is_idle()


@overlaps
def test_two_of_one_prompt_at_once(overlap: bool) -> None:
    reported = ran(alone(overlap), {"a": (LONG, ASKED), "b": (LONG, ASKED), "c": (LONG, Sampling(2))})
    right(LONG, reported.scores["a"])
    right(LONG, reported.scores["b"])
    assert reported.tokens["c"] == reference(LONG, 2)


@overlaps
def test_a_preempted_prompt_is_told_once(overlap: bool) -> None:
    worker = alone(overlap, pages=14, limits=Limits(tokens=6, running=4, page_size=4))
    reported, requests = Reported(), {f"r{n}": ([n, *LONG[:9]], Sampling(16, prompt_logprobs=1)) for n in range(4)}
    ran(worker, requests, reported)
    assert worker.engine.stats.preemptions > 0
    for request, (prompt, _) in requests.items():
        right(prompt, reported.scores[request])
        assert reported.tokens[request] == reference(prompt, 16)


@overlaps
def test_one_token_has_nothing_to_score(overlap: bool) -> None:
    reported = ran(alone(overlap), {"a": ([5], ASKED)})
    assert reported.scores == {}
    assert reported.tokens["a"] == reference([5], 3)


@overlaps
def test_prefill_tells_and_decode_does_not(overlap: bool) -> None:
    pair = Pair(prefill_pages=24, decode_pages=24, overlap=overlap)
    ran(pair.decode, {"before": (LONG[:16], Sampling(1))})
    reported = {"p": Reported(), "d": Reported()}
    lease = pair.lease("a", LONG, sampling=ASKED)
    assert lease.first == 16  # what is cached is not written again, though it is computed again
    pair.submit("a", LONG, lease, sampling=ASKED)
    for _ in range(60):
        for name, worker in (("p", pair.prefill), ("d", pair.decode)):
            worker.engine.step()
            pair.deliver()
            reported[name].add(worker.engine.drain().get(ROUTER, []))
    right(LONG, reported["p"].scores["a"])
    assert reported["d"].scores == {}
    assert reported["d"].tokens["a"] == reference(LONG, 3)
    assert pair.is_idle()


@overlaps
def test_decode_that_computes_the_prompt_again_after_a_preemption_tells_nothing(overlap: bool) -> None:
    pair = Pair(prefill_pages=24, decode_pages=16, overlap=overlap)
    asked = Sampling(20, prompt_logprobs=1)
    pair.decode.engine.submit(ROUTER, Submit("older", [4, 2], Sampling(50)))
    lease = pair.lease("a", LONG, sampling=asked)
    pair.submit("a", LONG, lease, sampling=asked)
    reported = {"p": Reported(), "d": Reported()}
    for _ in range(200):
        for name, worker in (("p", pair.prefill), ("d", pair.decode)):
            worker.engine.step()
            pair.deliver()
            reported[name].add(worker.engine.drain().get(ROUTER, []))
    assert pair.decode.engine.stats.preemptions > 0
    assert reported["d"].scores == {}
    assert reported["d"].tokens["a"] == reference(LONG, 20)
    right(LONG, reported["p"].scores["a"])
    assert pair.is_idle()


@overlaps
def test_a_decode_worker_that_prefills_itself_tells(overlap: bool) -> None:
    pair = Pair(prefill_pages=24, decode_pages=24, overlap=overlap)
    reported = Reported()
    reserve = Reserve("a", LONG, ASKED, pair.prefill.endpoint, "", threshold=len(LONG) + 1, nonces=True)
    pair.decode.engine.reserve(ROUTER, reserve)
    for _ in range(40):
        pair.decode.engine.step()
        pair.deliver()
        reported.add(pair.decode.engine.drain().get(ROUTER, []))
    assert reported.leases["a"].lease is None
    right(LONG, reported.scores["a"])


def test_what_is_cached_at_decode_is_no_reason_to_prefill_there() -> None:
    pair = Pair(prefill_pages=24, decode_pages=24)
    ran(pair.decode, {"before": (LONG, Sampling(1))})
    reported = Reported()
    for request, sampling in (("plain", Sampling(3)), ("scored", ASKED)):
        reserve = Reserve(request, LONG, sampling, pair.prefill.endpoint, "", threshold=20, nonces=True)
        pair.decode.engine.reserve(ROUTER, reserve)
    for _ in range(10):
        pair.decode.engine.step()
        reported.add(pair.decode.engine.drain().get(ROUTER, []))
    assert reported.leases["plain"].lease is None
    assert reported.leases["scored"].lease is not None


def test_long_prompts_are_told_in_frames_of_a_bounded_size() -> None:
    some = [PromptLogprobs(-1.0, 1)] * MOST_SCORES
    deltas = [Delta(f"r{n}", prompt_index=1, prompt_logprobs=some) for n in range(20)]
    deltas.insert(9, Delta("t", tokens=[1]))
    shares = list(_shares(deltas))
    assert [delta for share in shares for delta in share] == deltas
    assert len(shares) == 3
    assert all(sum(len(delta.prompt_logprobs) for delta in share) <= MOST_FRAME_SCORES for share in shares)
