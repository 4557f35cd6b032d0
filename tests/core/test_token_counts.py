"""A token is counted once, where it happens: computed, cached, read, received, skipped, generated."""

from pair import PROMPT, ROUTER, Pair
from toy import reference

from kvasir_engine.core.metrics import EngineCollector
from kvasir_engine.core.stats import TokenCounts
from kvasir_engine.protocol import Leased, Reserve, Sampling, Submit


def counts(pair: Pair) -> tuple[TokenCounts, TokenCounts]:
    return pair.prefill.engine.stats.requests, pair.decode.engine.stats.requests


def test_a_handoffs_prompt_is_computed_at_prefill_and_received_at_decode() -> None:
    pair = Pair()
    pair.begin("r", PROMPT, 3)
    pair.run()
    assert pair.tokens_of("r") == reference(PROMPT, 3)
    assert counts(pair) == (TokenCounts(computed=10, generated=1), TokenCounts(received=10, generated=2))


def test_what_either_side_had_is_cached_there_or_skipped() -> None:
    pair = Pair()
    for request in ("r", "again"):
        pair.begin(request, PROMPT, 3)
        pair.run()
    prefill, decode = counts(pair)
    assert prefill == TokenCounts(computed=10 + 1, cached=9, generated=2)  # the last token is always computed
    assert decode == TokenCounts(received=10 + 2, skipped=8, generated=4)  # whole pages of 4


def test_a_short_remainder_is_computed_at_decode_alone() -> None:
    pair = Pair()
    reserve = Reserve("r", PROMPT, Sampling(max_tokens=3), pair.prefill.endpoint, "", 100)
    pair.decode.engine.reserve(ROUTER, reserve)
    pair.run()
    assert counts(pair) == (TokenCounts(), TokenCounts(computed=10, generated=3))


def test_a_preempted_sequences_tokens_are_not_counted_again() -> None:
    pair = Pair(decode_pages=6)
    for n in range(3):
        submit = Submit(f"r{n}", [n, *PROMPT[1:5]], Sampling(max_tokens=12))
        pair.decode.engine.submit(ROUTER, submit)
    pair.run()
    assert pair.decode.engine.stats.preemptions > 0
    assert pair.decode.engine.stats.computed_tokens > 15 + 36
    found = counts(pair)[1]
    assert (found.computed + found.cached, found.generated) == (15, 36)


def test_a_received_prompt_that_is_preempted_is_not_computed_in_the_counts() -> None:
    pair = Pair(decode_pages=8)
    for n in range(2):
        pair.begin(f"r{n}", [n, *PROMPT[1:]], 12)
        pair.deliver()
    pair.run()
    prefill, decode = counts(pair)
    assert pair.decode.engine.stats.preemptions > 0
    assert (prefill.computed, prefill.generated) == (20, 2)
    assert decode == TokenCounts(received=20, generated=22)


def test_canaries_are_counted_apart() -> None:
    pair = Pair()
    reserve = Reserve("c", PROMPT, Sampling(max_tokens=2), pair.prefill.endpoint, "", 0, canary=True)
    pair.decode.engine.reserve(ROUTER, reserve)
    pair.decode.engine.step()
    pair.decode.run_commands()
    (lease,) = [each.lease for each in pair.frames(pair.decode) if isinstance(each, Leased)]
    assert lease is not None
    submit = Submit("c", PROMPT, Sampling(max_tokens=2), "", lease, pair.decode.endpoint, canary=True)
    pair.prefill.engine.submit(ROUTER, submit)
    pair.run()
    assert counts(pair) == (TokenCounts(), TokenCounts())
    assert pair.prefill.engine.stats.canaries == TokenCounts(computed=10, generated=1)
    assert pair.decode.engine.stats.canaries == TokenCounts(received=10, generated=1)


def test_the_metrics_have_every_count_by_its_source() -> None:
    pair = Pair()
    for request in ("r", "again"):
        pair.begin(request, PROMPT, 3)
        pair.run()
    shown = {
        (sample.name, sample.labels.get("source")): sample.value
        for family in EngineCollector(pair.prefill.engine).collect()
        for sample in family.samples
    }
    assert (
        shown["kvasir_prompt_tokens_total", "computed"]
        == shown["kvasir_prefix_cache_miss_tokens_total", None]
        == 11
    )
    assert shown["kvasir_prompt_tokens_total", "cached"] == shown["kvasir_prefix_cache_hit_tokens_total", None] == 9
    assert shown["kvasir_prompt_tokens_total", "read"] == 0
    assert {source for name, source in shown if name == "kvasir_canary_tokens_total"} == {
        "computed",
        "cached",
        "read",
        "received",
        "skipped",
        "generated",
        "forced",
    }
