"""A grammar's text: the same with and without jumps, in any batch, on any worker, and never another."""

from typing import Any

import msgspec
import pytest
import torch
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from pair import LIMITS, PROMPT, ROUTER, Pair
from simulation import Network, Worker
from toy import VOCAB, following
from toy_grammar import END, Places, ToyMatcher, grammar_of, service

from kvasir_engine.core.scheduler import Limits
from kvasir_engine.protocol import (
    Delta,
    Grammar,
    Leased,
    LogitsProcessors,
    Reserve,
    Sampling,
    Submit,
    TokenLogprobs,
)
from kvasir_engine.sampling.sampler import SampleRequest, sample
from kvasir_engine.sampling.token_history import TokenHistory
from kvasir_engine.sampling.token_masks import NO_TOKEN

TABLE = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(3)) * 2
FORCED = [([n], [n]) for n in (11, 12, 13, 14, 15)]
OBJECT: Places = [*FORCED, ([1, 2, 3], [1]), *FORCED, *FORCED, ([4, 5, 6], [7, 8, 9]), ([1], [2]), *FORCED]
"""Mostly forced, as an object of a schema is."""
DRAWN: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 0.9, "seed": 5, "top_p": 0.9},
    "penalized": {"temperature": 0.7, "seed": 2, "processors": LogitsProcessors(repetition_penalty=1.5)},
}
overlaps = pytest.mark.parametrize("overlap", [False, True])
jumps = pytest.mark.parametrize("jump", [False, True])
cases = pytest.mark.parametrize("how", DRAWN.values(), ids=DRAWN)


@pytest.fixture(autouse=True)
def _rich_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy's logits name one token; here they are a row of the table for each."""
    plain = toy.one_hot
    monkeypatch.setattr(toy, "one_hot", lambda sums: TABLE[plain(sums).argmax(-1)])


class Filled:
    def __init__(self, matcher: ToyMatcher) -> None:
        self.matcher = matcher

    def words(self) -> Any:
        words = torch.zeros(-(-VOCAB // 32), dtype=torch.int32).numpy()
        self.matcher.fill_mask(words)
        return words


def expected(prompt: list[int], sampling: Sampling, places: Places) -> tuple[list[int], str]:
    """One token after the other, each by the mask."""
    matcher, tokens = ToyMatcher(places), list(prompt)
    while True:
        work = None
        if sampling.processors is not None:
            work = TokenHistory(sampling.processors, len(prompt)).work(tokens, None)
        asked = SampleRequest(sampling, len(tokens), len(tokens) - len(prompt), work, Filled(matcher))
        (token,) = sample(TABLE[following(tokens)].unsqueeze(0), [asked]).tokens
        if token == NO_TOKEN:
            return tokens[len(prompt) :], "no_token_allowed"
        tokens.append(token)
        generated = tokens[len(prompt) :]
        if tokens[-1] == END or tokens[-1] in sampling.stop_token_ids:
            return generated, "stop"
        if len(generated) >= sampling.max_tokens:
            return generated, "length"
        assert matcher.accept(tokens[-1])


class Run:
    """What some requests were told."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.finished: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self.scores: dict[str, list[TokenLogprobs]] = {}
        self.prompts: dict[str, list[int]] = {}
        """The places of prompts' tokens that were scored."""

    def take(self, delta: Delta) -> None:
        said = self.tokens.setdefault(delta.id, [])
        assert delta.failure or delta.index == len(said), "a token twice, or one left out"
        assert delta.id not in self.finished
        said += delta.tokens
        if delta.prompt_logprobs is not None:
            places = range(delta.prompt_index, delta.prompt_index + len(delta.prompt_logprobs))
            self.prompts.setdefault(delta.id, []).extend(places)
        if delta.logprobs is not None:
            self.scores.setdefault(delta.id, []).extend(delta.logprobs)
            assert len(delta.logprobs) == len(delta.tokens)
        if delta.finish is not None:
            self.finished[delta.id] = delta.finish
        if delta.failure is not None:
            self.failed[delta.id] = f"{delta.failure.code}: {delta.failure.message}"


def ran(worker: Worker, requests: dict[str, tuple[list[int], Sampling]]) -> Run:
    run = Run()
    for request, (prompt, sampling) in requests.items():
        worker.engine.submit(ROUTER, Submit(request, prompt, sampling))
    for _ in range(20_000):
        worker.engine.step()
        worker.engine.check()
        for delta in worker.engine.drain().get(ROUTER, []):
            assert isinstance(delta, Delta)
            run.take(delta)
        if not worker.engine.jobs and not worker.engine.busy:
            assert worker.engine.cache.pool.available == worker.engine.cache.pool.size
            return run
    raise AssertionError("it does not end")


def alone(grammars: Any, overlap: bool = False, pages: int = 12, limits: Limits = LIMITS) -> Worker:
    return Worker(Network(), "both", "b", pages, limits, overlap, grammars)


def asked(places: Places, count: int = 40, **how: Any) -> Sampling:
    return Sampling(count, grammar=grammar_of(places), stop_token_ids=[END], **how)


@overlaps
@jumps
@cases
def test_the_text_is_that_of_the_masks_alone(how: dict[str, Any], jump: bool, overlap: bool) -> None:
    with service(jump) as grammars:
        for count in (40, 23, 7, 3, 1):
            sampling = asked(OBJECT, count, **how)
            worker = alone(grammars, overlap)
            run = ran(worker, {"a": (PROMPT, sampling)})
            assert (run.tokens["a"], run.finished["a"]) == expected(PROMPT, sampling, OBJECT)
            forced = worker.engine.stats.requests.forced
            assert forced + worker.engine.stats.requests.generated == len(run.tokens["a"])
            assert (forced > 0) == (jump and count > 1)


def test_a_jump_saves_the_steps_of_what_is_forced() -> None:
    launched = []
    for jump in (False, True):
        with service(jump) as grammars:
            worker = alone(grammars)
            ran(worker, {"a": (PROMPT, asked(OBJECT))})
            launched.append(worker.engine.stats.eager_steps)
    assert launched[0] == len(OBJECT) + 1
    assert launched[1] <= 3


@jumps
def test_a_token_that_ends_the_grammar_ends_the_request_though_no_token_stops_it(jump: bool) -> None:
    with service(jump) as grammars:
        sampling = msgspec.structs.replace(asked(OBJECT), stop_token_ids=[])
        run = ran(alone(grammars), {"a": (PROMPT, sampling)})
        assert (run.tokens["a"], run.finished["a"]) == expected(PROMPT, sampling, OBJECT)
        assert run.tokens["a"][-1] == END


@overlaps
@jumps
def test_a_stop_token_within_what_is_forced_ends_there(overlap: bool, jump: bool) -> None:
    with service(jump) as grammars:
        sampling = msgspec.structs.replace(asked(OBJECT), stop_token_ids=[END, 14])
        run = ran(alone(grammars, overlap), {"a": (PROMPT, sampling)})
        assert (run.tokens["a"], run.finished["a"]) == ([11, 12, 13, 14], "stop")


def scores(tokens: list[int], prompt: list[int]) -> list[tuple[float, list[tuple[int, float]]]]:
    """Each token's log-probability and the two likeliest, by the model's own distribution before it."""
    found = []
    for at, token in enumerate(tokens):
        row = TABLE[following([*prompt, *tokens[:at]])].log_softmax(-1)
        top = row.topk(2)
        found.append((float(row[token]), list(zip(top.indices.tolist(), top.values.tolist(), strict=True))))
    return found


def same_scores(run: Run, name: str, prompt: list[int]) -> bool:
    flat = [
        [each.logprob, *(value for _, value in each.top), *(token for token, _ in each.top)]
        for each in run.scores[name]
    ]
    right = [
        [logprob, *(value for _, value in top), *(token for token, _ in top)]
        for logprob, top in scores(run.tokens[name], prompt)
    ]
    return len(flat) == len(right) and torch.allclose(torch.tensor(flat), torch.tensor(right), atol=1e-5)


@overlaps
@jumps
@cases
def test_log_probabilities_are_told_of_each_token_forced_or_not(
    how: dict[str, Any], jump: bool, overlap: bool
) -> None:
    with service(jump) as grammars:
        for count in (40, 23, 22, 7, 3, 1):
            sampling = asked(OBJECT, count, logprobs=2, **how)
            worker = alone(grammars, overlap)
            run = ran(worker, {"a": (PROMPT, sampling)})
            assert (run.tokens["a"], run.finished["a"]) == expected(PROMPT, sampling, OBJECT)
            assert same_scores(run, "a", PROMPT)
            assert (worker.engine.stats.requests.forced > 0) == (jump and count > 1)


@overlaps
def test_log_probabilities_of_forced_tokens_outlive_preemption_small_chunks_and_cached_prefixes(
    overlap: bool,
) -> None:
    places: Places = [([1, 2, 3], [1]), *FORCED, ([4, 5], [7, 8]), *FORCED, ([1], [2]), *FORCED, ([4], [5])]
    requests = {
        f"r{n}": ([n % 2, 1, 1, 1, 1, n % 2], asked(places, logprobs=2, temperature=0.5, seed=n)) for n in range(6)
    }
    prompted = {"p": ([1, 2, 3, 1, 2], asked(places, logprobs=2, prompt_logprobs=1))}
    free = {f"f{n}": ([n, 2, n], Sampling(30, temperature=1.0, seed=n)) for n in range(4)}
    preemptions = 0
    with service() as grammars:
        for tokens in (5, 9, 16):
            worker = alone(grammars, overlap, 16, Limits(tokens, 6, 4))
            run = ran(worker, {**requests, **prompted, **free})
            preemptions += worker.engine.stats.preemptions
            assert worker.engine.stats.requests.forced > 0
            for name, (prompt, sampling) in (requests | prompted).items():
                assert (run.tokens[name], run.finished[name]) == expected(prompt, sampling, places)
                assert same_scores(run, name, prompt)
            assert run.prompts["p"] == [1, 2, 3, 4]
    assert preemptions > 0


@overlaps
@jumps
def test_free_and_constrained_requests_share_steps_and_preempt_each_other(overlap: bool, jump: bool) -> None:
    requests = {
        f"r{n}": ([n, 1, 1, n], asked(OBJECT, **how)) for n, how in enumerate([*DRAWN.values(), *DRAWN.values()])
    }
    free = {f"f{n}": ([n, 2, n], Sampling(30, temperature=1.0, seed=n)) for n in range(4)}
    with service(jump) as grammars:
        worker = alone(grammars, overlap, pages=16)
        run = ran(worker, {**requests, **free})
        plain = ran(alone(None, overlap), free)
        assert worker.engine.stats.preemptions > 0
    for name, (prompt, sampling) in requests.items():
        assert (run.tokens[name], run.finished[name]) == expected(prompt, sampling, OBJECT)
    for name in free:
        assert run.tokens[name] == plain.tokens[name]


@overlaps
@jumps
@cases
def test_decode_goes_on_from_prefills_token(how: dict[str, Any], jump: bool, overlap: bool) -> None:
    sampling = asked(OBJECT, **how)
    with service(jump) as grammars:
        pair = Pair(overlap=overlap, grammars=grammars)
        lease = leased(pair, sampling)
        pair.submit("a", PROMPT, lease, sampling=sampling)
        compiled(pair.prefill)
        pair.run()
        assert not pair.failures
        assert pair.tokens_of("a") == expected(PROMPT, sampling, OBJECT)[0]
        assert pair.is_idle()
        assert (pair.decode.engine.stats.requests.forced > 0) == jump
        assert pair.prefill.engine.stats.requests.forced == 0


def compiled(worker: Worker) -> None:
    while any(job.compiling for job in worker.engine.jobs.values()):
        worker.engine.step()


def leased(pair: Pair, sampling: Sampling) -> Any:
    pair.decode.engine.reserve(ROUTER, Reserve("a", PROMPT, sampling, pair.prefill.endpoint, "", 0))
    compiled(pair.decode)
    pair.decode.engine.step()
    pair.decode.run_commands()
    (frame,) = pair.frames(pair.decode)
    assert isinstance(frame, Leased)
    return frame.lease


@overlaps
@jumps
@cases
def test_a_continuation_elsewhere_goes_on_as_if_nothing_had_happened(
    how: dict[str, Any], jump: bool, overlap: bool
) -> None:
    """The router replays the prompt and what was generated, and says how much of it that is."""
    right, _ = expected(PROMPT, asked(OBJECT, **how), OBJECT)
    with service(jump) as grammars:
        for sent in range(1, len(right), 3):
            processors = msgspec.structs.replace(how.get("processors") or LogitsProcessors(), replayed=sent)
            sampling = asked(OBJECT, 40 - sent, **{**how, "processors": processors})
            run = ran(alone(grammars, overlap), {"a": ([*PROMPT, *right[:sent]], sampling)})
            assert run.tokens["a"] == right[sent:]
            assert run.finished["a"] == "stop"


@overlaps
@jumps
def test_where_nothing_is_left_the_request_fails_by_itself(overlap: bool, jump: bool) -> None:
    conflicts: dict[str, dict[str, Any]] = {
        "min_tokens": {"min_tokens": 39},
        "allowed": {"processors": LogitsProcessors(allowed_token_ids=[11, 12, 13])},
        "bad words": {"processors": LogitsProcessors(bad_words=[[14]])},
    }
    with service(jump) as grammars:
        requests = {name: (PROMPT, asked(OBJECT, **how)) for name, how in conflicts.items()}
        run = ran(alone(grammars, overlap, pages=32), {**requests, "free": ([5], Sampling(9))})
    assert run.finished == {"free": "length"}
    assert run.failed.keys() == conflicts.keys()
    assert all(why.startswith("no_token_allowed: no token is left after") for why in run.failed.values())
    assert run.tokens["allowed"] == run.tokens["bad words"] == [11, 12, 13]
    assert len(run.tokens["min_tokens"]) == len(OBJECT)


def test_a_grammar_that_does_not_compile_fails_its_request_with_its_part_and_no_other() -> None:
    bad = Sampling(4, grammar=Grammar("regex", "nonsense"))
    with service() as grammars:
        run = ran(
            alone(grammars), {"bad": (PROMPT, bad), "good": (PROMPT, asked(OBJECT)), "free": ([5], Sampling(2))}
        )
    assert run.failed == {"bad": "bad_request: grammar: places[0]: it is no list of sets"}
    assert run.finished == {"good": "stop", "free": "length"}


def test_a_worker_that_compiles_none_says_so() -> None:
    run = ran(alone(None), {"a": (PROMPT, asked(OBJECT))})
    assert run.failed == {"a": "bad_request: grammar: this worker compiles none"}


def test_what_was_generated_before_and_is_in_no_text_of_the_grammar_is_refused() -> None:
    sampling = asked(OBJECT, processors=LogitsProcessors(replayed=1))
    with service() as grammars:
        run = ran(alone(grammars), {"a": ([*PROMPT, 1], sampling)})
    assert run.failed == {"a": "bad_request: grammar: what was generated before is not in its language"}


def test_a_request_that_leaves_while_its_grammar_is_compiled_leaves_nothing() -> None:
    with service() as grammars:
        worker = alone(grammars)
        worker.engine.submit(ROUTER, Submit("a", PROMPT, asked(OBJECT)))
        worker.engine.abort(ROUTER, "a")
        run = ran(worker, {"b": (PROMPT, asked(OBJECT))})
        assert run.finished == {"b": "stop"}
        assert grammars.compiling == 0


sets = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=3, unique=True)
single = st.integers(0, VOCAB - 2).map(lambda token: [token])
place = st.one_of(st.tuples(single, single), single.map(lambda one: (one, one)), st.tuples(sets, sets))


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(
        st.tuples(
            st.lists(st.integers(0, 2), min_size=1, max_size=9),
            st.one_of(st.none(), st.lists(place, max_size=18)),
            st.integers(1, 24),
            st.sampled_from([0.0, 1.0]),
        ),
        min_size=1,
        max_size=6,
    ),
    pages=st.integers(9, 16),
    tokens=st.integers(5, 16),
)
def test_any_grammars_in_any_batch_give_the_text_of_their_masks(
    requests: list[tuple[list[int], Places | None, int, float]], pages: int, tokens: int
) -> None:
    asking = {
        f"r{n}": (
            prompt,
            Sampling(count, temperature, seed=n)
            if places is None
            else asked(places, count, temperature=temperature, seed=n),
        )
        for n, (prompt, places, count, temperature) in enumerate(requests)
    }
    for overlap in (False, True):
        for jump in (False, True):
            with service(jump) as grammars:
                run = ran(alone(grammars, overlap, pages, Limits(tokens, 4, 4)), asking)
            assert not run.failed
            for n, (prompt, places, _, _) in enumerate(requests):
                if places is not None:
                    right = expected(prompt, asking[f"r{n}"][1], places)
                    assert (run.tokens[f"r{n}"], run.finished[f"r{n}"]) == right
