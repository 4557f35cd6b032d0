"""Text leaves whole and never ahead of a stop string, however tokens cut it."""

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvasir_engine.api.detokenizer import Detokenizer, Piece, named
from kvasir_engine.engine_client import Output
from kvasir_engine.protocol import TokenLogprobs


class Vocabulary:
    """Token i is the i-th given byte string."""

    def __init__(self, tokens: list[bytes]) -> None:
        self.tokens = tokens

    def token_bytes(self, token: int) -> bytes:
        return self.tokens[token]

    def token_name(self, token: int) -> str | None:
        return f"<{token}>" if token < len(self.tokens) else None


def cut(data: bytes, at: list[int]) -> list[bytes]:
    bounds = sorted({0, len(data), *(place % (len(data) + 1) for place in at)})
    return [data[a:b] for a, b in pairwise(bounds)]


def run(
    tokens: list[bytes], stop: list[str], each: int = 1, scored: bool = False, min_tokens: int = 0
) -> list[Piece]:
    detokenizer = Detokenizer(Vocabulary(tokens), stop, min_tokens)
    pieces = []
    ids = list(range(len(tokens)))
    for start in range(0, max(len(ids), 1), each):
        some = ids[start : start + each]
        finish = "length" if start + each >= len(ids) else None
        logprobs = [TokenLogprobs(-1.0) for _ in some] if scored else None
        pieces.append(detokenizer.push(Output(some, logprobs, finish)))
        if pieces[-1].finish_reason:
            break
    return pieces


def before_stop(text: str, stop: list[str]) -> str:
    for end in range(len(text) + 1):
        whole = [each for each in stop if text[:end].endswith(each)]
        if whole:
            return text[: end - max(map(len, whole))]
    return text


TEXT = st.text(st.sampled_from("ab¢€😀 \n"), max_size=24)
STOPS = st.lists(st.text(st.sampled_from("ab€\n"), min_size=1, max_size=4), max_size=4)


@given(TEXT, STOPS, st.lists(st.integers(0, 200), max_size=30), st.integers(1, 3))
@example("aab", ["ab"], [1, 2], 1)
@example("ab😀", ["b😀"], [3, 4, 5], 1)
@example("a\na", ["\n", "a\na"], [2], 1)
@example("a\na", ["\n", "a\na"], [], 1)
def test_what_has_been_sent_is_always_a_beginning_of_the_right_answer(
    text: str, stop: list[str], at: list[int], each: int
) -> None:
    right = before_stop(text, stop)
    pieces = run(cut(text.encode(), at), stop, each)
    sent = ""
    for piece in pieces:
        sent += piece.text
        assert right.startswith(sent)
    assert sent == right
    assert pieces[-1].finish_reason == ("stop" if right != text else "length")


@given(TEXT, st.lists(st.integers(0, 200), max_size=30))
def test_logprobs_come_once_each_in_order_and_their_bytes_are_the_text(text: str, at: list[int]) -> None:
    tokens = cut(text.encode(), at)
    pieces = run(tokens, ["€b", "zz"], scored=True)
    scored = [token for piece in pieces for token in piece.scored]
    if pieces[-1].finish_reason == "length":
        assert [token.token.raw or b"" for token in scored] == tokens
    assert [token.offset for token in scored] == sorted(token.offset for token in scored)
    assert (
        b"".join(token.token.raw or b"" for token in scored)
        .decode("utf-8", "ignore")
        .startswith(before_stop(text, ["€b"]))
    )


def test_a_stop_string_spread_over_tokens_is_held_back_and_cuts_its_tokens_logprobs() -> None:
    pieces = run([b"on", b"e S", b"TO", b"P two"], ["STOP"], scored=True)
    assert [piece.text for piece in pieces] == ["on", "e ", "", ""]
    assert pieces[-1].finish_reason == "stop"
    assert [token.token.raw or b"" for piece in pieces for token in piece.scored] == [b"on", b"e S"]


def test_a_false_alarm_is_released() -> None:
    pieces = run([b"S", b"T", b"U"], ["STOP"])
    assert [piece.text for piece in pieces] == ["", "", "STU"]


def test_tokens_after_a_stop_string_in_the_same_output_are_not_counted() -> None:
    pieces = run([b"a", b"X", b"b", b"c"], ["X"], each=4)
    assert [(piece.text, piece.tokens) for piece in pieces] == [("a", 2)]


def test_a_stop_string_within_min_tokens_is_text() -> None:
    pieces = run([b"X", b"a", b"X", b"b"], ["X"], min_tokens=2)
    assert "".join(piece.text for piece in pieces) == "Xa"
    assert pieces[-1].finish_reason == "stop"


def test_the_stop_token_is_counted_and_not_shown() -> None:
    detokenizer = Detokenizer(Vocabulary([b"a", b"END"]))
    assert detokenizer.push(Output([0, 1], None, "stop")) == Piece("a", 2, [], "stop")


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ([b"a", "€".encode()[:2]], "a"),  # ends within a character
        (["€".encode()[:2], b"a"], "\ufffda"),  # bytes that never become one
        ([b"\xff", b"b"], "\ufffdb"),
    ],
)
def test_bytes_that_are_no_character(tokens: list[bytes], text: str) -> None:
    assert "".join(piece.text for piece in run(tokens, [])) == text


def test_names_of_tokens_are_their_text_or_their_bytes_or_what_they_are_called() -> None:
    vocabulary = Vocabulary(["é".encode(), b"\xf0\x9f", b"a\xe2", b"\\", b""])
    names = [named(vocabulary, token).name for token in range(5)]
    assert names == ["é", "bytes:\\xf0\\x9f", "bytes:\\x61\\xe2", "\\", "<4>"]
    assert [named(vocabulary, token).raw for token in (1, 4)] == [b"\xf0\x9f", None]
