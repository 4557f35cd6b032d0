"""KV moves between workers of other numbers of ranks and other page sizes, and the tokens are those of one rank."""

import itertools
import random
import re

import pytest
from rank_workers import END, Greedy, Request, Router, Workers

from kvasir_engine.connector.layout import pairs
from kvasir_engine.protocol import Grammar

pytestmark = pytest.mark.dataplane

COUNT = 6
PAIRS = [((1, 32), (2, 16)), ((2, 16), (2, 16)), ((4, 16), (2, 16)), ((2, 16), (1, 32)), ((4, 16), (1, 32))]
"""Ranks and page size of prefill and of decode."""
ALL = list(itertools.product(itertools.product((1, 2, 4), (16, 32)), repeat=2))


def check(workers: Workers, greedy: Greedy, prefill: tuple[int, int], decode: tuple[int, int]) -> None:
    """Prompts of a pair that end in and at the end of pages, and two turns of a conversation."""
    rng = random.Random(str((prefill, decode)))
    router = Router(workers("prefill", *prefill), workers("decode", *decode))
    moved, _ = router.decode.ask("received")
    first = greedy.prompt(rng, 75, COUNT)
    turns = [first, greedy.prompt(rng, 120, COUNT, first)]
    prompts = [*turns, greedy.prompt(rng, 64, COUNT), greedy.prompt(rng, 1, COUNT)]
    for number, turn in enumerate(prompts):
        request = Request(f"{prefill}-{decode}-{number}", turn, COUNT)
        router.ask(request)
        router.run()
        assert not request.failures
        assert request.output == greedy(turn, COUNT)
    together = [
        Request(f"{prefill}-{decode}-at-once-{n}", greedy.prompt(rng, 40 + n, COUNT), COUNT) for n in (0, 9)
    ]
    for request in together:
        router.ask(request)
    router.run()
    assert [request.output for request in together] == [greedy(request.prompt, COUNT) for request in together]
    had = next(request.cached for request in router.requests.values() if request.prompt == turns[1])
    assert had == 64, "the second turn's lease begins after the whole pages of the first"
    after, _ = router.decode.ask("received")
    assert after - moved == sum(len(request.prompt) - request.cached for request in router.requests.values())
    for worker in (router.prefill, router.decode):
        worker.wait_quiet()
    ours, theirs = router.prefill.endpoint, router.decode.endpoint
    assert ours
    assert theirs
    measured = [(link.rank, link.peer) for link in router.prefill.ask("links")]
    to = {theirs.agent_of(rank) for rank in range(decode[0])}
    parts = [(rank, theirs.agent_of(other)) for rank, other in pairs(ours.fingerprint, theirs.fingerprint)]
    assert sorted(each for each in measured if each[1] in to) == sorted(parts), "each rank measures its own links"


@pytest.mark.parametrize(("prefill", "decode"), PAIRS)
def test_the_tokens_are_those_of_one_rank(
    workers: Workers, greedy: Greedy, prefill: tuple[int, int], decode: tuple[int, int]
) -> None:
    check(workers, greedy, prefill, decode)


@pytest.mark.soak
@pytest.mark.parametrize(("prefill", "decode"), [pair for pair in ALL if pair not in PAIRS])
def test_the_tokens_are_those_of_one_rank_in_every_pairing(
    workers: Workers, greedy: Greedy, prefill: tuple[int, int], decode: tuple[int, int]
) -> None:
    check(workers, greedy, prefill, decode)


def test_what_a_grammar_forces_is_computed_by_all_ranks(workers: Workers) -> None:
    """The text between two choices takes no step a token, and the ranks' KV of it is that of one rank."""
    source = "[a-c](: all of this is certain, )[0-9](, and so is this: )(yes|no)(!!!)"
    outputs = []
    for prefill, decode in (((1, 32), (2, 16)), ((2, 16), (2, 16)), ((2, 16), (1, 32))):
        router = Router(workers("prefill", *prefill), workers("decode", *decode))
        before = router.decode.ask("forced")
        request = Request(f"forced-{prefill}-{decode}", list(range(3, 43)), 80, grammar=Grammar("regex", source))
        router.ask(request)
        router.run()
        assert not request.failures
        assert request.output[-1] == END
        text = "".join(chr(32 + token) for token in request.output[:-1])
        assert re.fullmatch(source, text)
        assert router.decode.ask("forced") - before > len(text) / 2
        outputs.append(request.output)
        for worker in (router.prefill, router.decode):
            worker.wait_quiet()
    assert outputs[1:] == outputs[:1] * 2


def test_each_byte_goes_once_and_comes_once(workers: Workers, greedy: Greedy) -> None:
    router = Router(workers("prefill", 4, 16), workers("decode", 1, 32))
    sent, received = (each.ask("received")[1] for each in (router.prefill, router.decode))
    rng = random.Random(8)
    request = Request("bytes", greedy.prompt(rng, 100, COUNT), COUNT)
    router.ask(request)
    router.run()
    for each in (router.prefill, router.decode):
        each.wait_quiet()
    sent_now, received_now = (each.ask("received")[1] for each in (router.prefill, router.decode))
    blocks = -(-100 // 16)
    token = 3 * 2 * 4 * 16 * 4  # layers, K and V, heads, dimensions, bytes
    assert sent_now.sent_bytes - sent.sent_bytes == received_now.received_bytes - received.received_bytes
    assert received_now.received_bytes - received.received_bytes == blocks * 16 * token
