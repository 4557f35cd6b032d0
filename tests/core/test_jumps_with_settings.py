"""Jumps beside settings that bar tokens: the text, and how it ends, is that of the masks alone."""

import itertools
from typing import Any

import msgspec
import pytest
import test_constrained_sequences as constrained
from hypothesis import given, settings
from hypothesis import strategies as st
from pair import PROMPT, Pair
from test_constrained_sequences import OBJECT, alone, asked, compiled, expected, leased, place, ran
from toy import VOCAB
from toy_grammar import END, Places, ToyCompiler, ToyGrammar, ToyMatcher, service

from kvasir_engine.core.grammar_service import GrammarService
from kvasir_engine.core.scheduler import Limits
from kvasir_engine.protocol import LogitsProcessors, Sampling
from kvasir_engine.sampling.token_history import TokenHistory

_rich_logits = constrained._rich_logits  # a fixture

BARS_NOTHING: dict[str, LogitsProcessors] = {
    "allowed_token_ids": LogitsProcessors(allowed_token_ids=[*range(3), *range(4, 20), END]),
    "bad_words": LogitsProcessors(bad_words=[[11, 13], [11, 12, 14], [2, 11, 12, 13], [17]]),
    "logit_bias": LogitsProcessors(logit_bias=[(13, -100.0), (END, -100.0), (2, 100.0), (20, 100.0)]),
    "penalties": LogitsProcessors(repetition_penalty=100.0, presence_penalty=2.0, frequency_penalty=2.0),
}
"""Of these `OBJECT` has an answer: what is barred is not forced, or only disliked."""
BARS: dict[str, tuple[LogitsProcessors, int]] = {
    "allowed_token_ids": (LogitsProcessors(allowed_token_ids=[11, 12, 13, 15, 1, 2, 3, END]), 3),
    "one bad word": (LogitsProcessors(bad_words=[[13]]), 2),
    "a bad word within forced text": (LogitsProcessors(bad_words=[[12, 13, 14]]), 3),
    "a bad word that ends in the second forced text": (LogitsProcessors(bad_words=[[1, 11, 12]]), 7),
    "no end": (LogitsProcessors(allowed_token_ids=list(range(END))), len(OBJECT)),
    "a bad word at the end": (LogitsProcessors(bad_words=[[15, END]]), len(OBJECT)),
}
"""And how many tokens of `OBJECT`, in which 1 is liked most where there is a choice, come before what is barred."""


def both(prompt: list[int], sampling: Sampling, overlap: bool = False, **how: Any) -> list[tuple[Any, int]]:
    """What came of a request, by the masks alone and with jumps: its tokens and how it ended; the forced tokens."""
    found = []
    for jump in (False, True):
        with service(jump) as grammars:
            worker = alone(grammars, overlap, **how)
            run = ran(worker, {"a": (prompt, sampling)})
            ended = run.finished.get("a") or run.failed["a"]
            found.append(((run.tokens.get("a", []), ended), worker.engine.stats.requests.forced))
    return found


@pytest.mark.parametrize("scored", [None, 1])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("processors", BARS_NOTHING.values(), ids=BARS_NOTHING)
def test_what_bars_no_forced_token_lets_it_jump(
    processors: LogitsProcessors, overlap: bool, scored: int | None
) -> None:
    sampling = asked(OBJECT, processors=processors, logprobs=scored)
    (masked, none), (jumped, forced) = both(PROMPT, sampling, overlap)
    assert masked == jumped == expected(PROMPT, sampling, OBJECT)
    assert masked[1] == "stop"
    assert (none, forced > len(OBJECT) / 2) == (0, True)


@pytest.mark.parametrize("scored", [None, 1])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("processors", "before"), BARS.values(), ids=BARS)
def test_a_jump_ends_before_a_barred_token_and_the_request_with_a_reason(
    processors: LogitsProcessors, before: int, overlap: bool, scored: int | None
) -> None:
    liked = msgspec.structs.replace(processors, logit_bias=[(1, 100.0)])
    sampling = asked(OBJECT, processors=liked, logprobs=scored)
    (masked, none), (jumped, forced) = both(PROMPT, sampling, overlap)
    assert masked == jumped
    assert jumped[0] == expected(PROMPT, sampling, OBJECT)[0]
    assert jumped[1].startswith(f"no_token_allowed: no token is left after {before} generated ones: ")
    assert (len(jumped[0]), none, forced > 0) == (before, 0, True)


@pytest.mark.parametrize("jump", [False, True])
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_an_end_that_comes_before_min_tokens_is_none(more: int, jump: bool) -> None:
    """A stop token is impossible until so many others are out."""
    sampling = asked(OBJECT, min_tokens=len(OBJECT) + more)
    with service(jump) as grammars:
        run = ran(alone(grammars), {"a": (PROMPT, sampling)})
    assert run.tokens["a"] == expected(PROMPT, sampling, OBJECT)[0]
    assert (run.finished.get("a"), len(run.tokens["a"]) - len(OBJECT)) == (("stop", 1) if more <= 0 else (None, 0))


class TwoEnds(ToyMatcher):
    """Two tokens end a text."""

    def allowed(self) -> list[int]:
        return [END - 1, END] if super().allowed() == [END] else super().allowed()

    def stopped(self) -> bool:
        return super().allowed() == [END]


class TwoEndsCompiler(ToyCompiler):
    def compile(self, grammar: Any) -> Any:
        places = super().compile(grammar).places

        class Compiled(ToyGrammar):
            def matcher(self) -> ToyMatcher:
                return TwoEnds(self.places)

        return Compiled(places)


@pytest.mark.parametrize(
    "how",
    [
        {"min_tokens": 30, "stop_token_ids": [END - 1]},
        {"processors": LogitsProcessors(allowed_token_ids=[11, END])},
        {"processors": LogitsProcessors(bad_words=[[11, END - 1]])},
    ],
)
@pytest.mark.parametrize("jump", [False, True])
def test_of_several_ends_the_one_comes_that_is_possible(how: dict[str, Any], jump: bool) -> None:
    sampling = msgspec.structs.replace(asked([([11], [11])], processors=LogitsProcessors()), **how)
    grammars = GrammarService(TwoEndsCompiler(), VOCAB, jump)
    try:
        run = ran(alone(grammars), {"a": (PROMPT, sampling)})
    finally:
        grammars.close()
    assert (run.tokens, run.finished) == ({"a": [11, END]}, {"a": "stop"})


@pytest.mark.parametrize("jump", [False, True])
@pytest.mark.parametrize("case", ["allowed_token_ids", "bad_words"])
def test_settings_hold_across_the_handoff(case: str, jump: bool) -> None:
    sampling = asked(OBJECT, processors=BARS_NOTHING[case])
    with service(jump) as grammars:
        pair = Pair(grammars=grammars)
        pair.submit("a", PROMPT, leased(pair, sampling), sampling=sampling)
        compiled(pair.prefill)
        pair.run()
        assert not pair.failures
        assert pair.tokens_of("a") == expected(PROMPT, sampling, OBJECT)[0]
        assert (pair.decode.engine.stats.requests.forced > 0) == jump


@pytest.mark.parametrize("jump", [False, True])
def test_a_bad_word_that_began_before_a_failover_is_not_completed_after_it(jump: bool) -> None:
    words = [[12, 13, 14]]
    with service(jump) as grammars:
        for sent in (1, 2, 3):
            processors = LogitsProcessors(bad_words=words, replayed=sent)
            run = ran(
                alone(grammars), {"a": ([*PROMPT, *[11, 12, 13][:sent]], asked(OBJECT, processors=processors))}
            )
            assert run.tokens.get("a", []) == [11, 12, 13][sent:]
            assert run.failed["a"].startswith("no_token_allowed")


tokens = st.integers(0, VOCAB - 1)
processors = st.builds(
    LogitsProcessors,
    presence_penalty=st.sampled_from([0.0, 2.0]),
    repetition_penalty=st.sampled_from([1.0, 1.7]),
    logit_bias=st.dictionaries(tokens, st.sampled_from([-100.0, -1.0, 100.0]), max_size=4).map(
        lambda biases: list(biases.items())
    ),
    bad_words=st.lists(st.lists(tokens, min_size=1, max_size=3), max_size=6),
    allowed_token_ids=st.one_of(
        st.none(), st.sets(tokens, max_size=3).map(lambda some: sorted(set(range(VOCAB)) - some))
    ),
)


def _words_of(places: Places, extent: list[int]) -> list[list[int]]:
    """Beginnings and pieces of what the grammar forces, as words: random ones would rarely be met."""
    forced = [one[0] for one, _ in places] + [END]
    return [forced[first : first + 1 + first % 3] for first in extent if first < len(forced)]


@settings(max_examples=100, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 2), min_size=1, max_size=6),
    places=st.lists(place, max_size=14),
    how=processors,
    words=st.lists(st.integers(0, 14), max_size=2),
    count=st.integers(1, 20),
    least=st.integers(0, 16),
    stops=st.lists(tokens, max_size=2),
    scored=st.sampled_from([None, 1]),
    budget=st.integers(5, 16),
)
def test_any_settings_beside_any_grammar_give_the_text_of_the_masks(
    prompt: list[int],
    places: Places,
    how: LogitsProcessors,
    words: list[int],
    count: int,
    least: int,
    stops: list[int],
    scored: int | None,
    budget: int,
) -> None:
    how = msgspec.structs.replace(how, bad_words=[*how.bad_words, *_words_of(places, words)])
    sampling = asked(places, count, processors=how, min_tokens=least, logprobs=scored)
    sampling = msgspec.structs.replace(sampling, stop_token_ids=sorted({END, *stops}))
    (masked, _), (jumped, _) = both(prompt, sampling, limits=Limits(budget, 4, 4))
    said, ended = expected(prompt, sampling, places)
    assert masked == jumped
    assert jumped[0] == said
    assert jumped[1].partition(":")[0] == ended


def test_bars_agrees_with_what_a_step_makes_impossible() -> None:
    """`TokenHistory.bars` and its `work` are two views of the same settings."""
    how = LogitsProcessors(bad_words=[[3], [1, 2], [1, 1, 4], [2, 1, 4]], allowed_token_ids=[1, 2, 3, 4, 6])
    history = TokenHistory(how, 1)
    for generated in itertools.product((1, 2, 5), repeat=3):
        for length in range(4):
            some = list(generated[:length])
            work = history.work([9, *some], None)
            assert work.allowed is not None
            for token in range(VOCAB):
                impossible = token in work.banned or token not in work.allowed
                assert history.bars(some, token) == impossible
