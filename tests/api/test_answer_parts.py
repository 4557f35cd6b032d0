"""An answer's parts are the same message as a chat's, and what changes adds up to them."""

from collections.abc import Iterator

import pytest
from conversations import Conversation, conversations, reasoned

from kvasir_engine.api.answer_parts import (
    AnswerParts,
    Change,
    Part,
    PartClosed,
    PartGrown,
    PartOpened,
    ReasoningPart,
    TextPart,
    ToolCallPart,
    deltas_of,
    parts_of,
)
from kvasir_engine.api.detokenizer import NamedToken, Piece, ScoredToken
from kvasir_engine.api.tools.choice import CallLimits, ChoiceParser
from kvasir_engine.api.tools.formats import OutputFormat
from kvasir_engine.api.tools.types import ContentDelta, ReasoningDelta, joined

FORMATS = ["hermes", "llama3_json", "mistral", "deepseek_v3", "openai", "json", "pythonic"]


def pieces_of(text: str, format: OutputFormat, step: int) -> Iterator[Piece]:
    names = frozenset({"get_weather", "search", "run-it_2"})
    ids = iter(f"call_{n}" for n in range(100))
    parser = ChoiceParser(format.parser(lambda: next(ids), names, None), CallLimits())
    for start in range(0, len(text), step):
        yield parser.parse(Piece(text[start : start + step], 1))
    yield parser.parse(Piece("", 1, finish_reason="stop"))


def texts(parts: list[PartClosed], kind: type[Part]) -> str | None:
    return "".join(each.part.text for each in parts if isinstance(each.part, kind)) or None


def replayed(changes: list[Change]) -> list[str]:
    """The text of each part, put together of what changed; one is open at a time."""
    whole: list[str] = []
    opened = False
    for change in changes:
        match change:
            case PartOpened(index):
                assert not opened
                assert index == len(whole)
                whole.append("")
                opened = True
            case PartGrown(index, _, text):
                assert opened
                assert index == len(whole) - 1
                whole[-1] += text
            case PartClosed(index, part):
                assert (opened, index) == (True, len(whole) - 1)
                assert whole[-1] == part.text
                opened = False
    assert not opened
    return whole


@pytest.mark.parametrize("step", [1, 7, 10_000])
@pytest.mark.parametrize("format", FORMATS)
def test_parts_are_the_message_that_a_chat_has(format: str, step: int) -> None:
    some: list[tuple[Conversation, OutputFormat]] = [
        (each, OutputFormat(format)) for each in list(conversations(format))[::5]
    ]
    if format == "hermes":
        some += [
            (each, OutputFormat("hermes", "qwen3")) for each in list(reasoned("<think>", "</think>", False))[::9]
        ]
    for conversation, how in some:
        pieces = list(pieces_of(conversation.text, how, step))
        message = joined(delta for piece in pieces for delta in deltas_of(piece))
        parts = parts_of(pieces)
        calls = [each.part for each in parts if isinstance(each.part, ToolCallPart)]
        assert texts(parts, TextPart) == message.content
        assert texts(parts, ReasoningPart) == message.reasoning
        assert [(each.id, each.name, each.text) for each in calls] == [
            (each.id, each.name, each.arguments) for each in message.tool_calls
        ]
        changing = AnswerParts()
        changes = [change for piece in pieces for change in changing.push(piece)]
        assert replayed(changes) == [each.part.text for each in parts]


def test_an_answer_of_nothing_is_nothing_or_an_empty_text() -> None:
    nothing = [Piece("", 1, finish_reason="stop")]
    assert parts_of(nothing) == []
    assert parts_of(nothing, never_empty=True) == [PartClosed(0, TextPart(), False)]


@pytest.mark.parametrize(
    ("last", "cut"),
    [
        (Piece("", 1, finish_reason="length"), True),
        (Piece("", 1, finish_reason="stop", stop="x"), True),
        (Piece("", 1, finish_reason="stop"), False),
    ],
)
def test_only_the_last_part_is_cut_off(last: Piece, cut: bool) -> None:
    first = Piece("a", 1, deltas=(ReasoningDelta("r"), ContentDelta("a")))
    assert [each.cut for each in parts_of([first, last])] == [False, cut]


def test_tokens_are_of_the_text_that_came_with_them_or_next() -> None:
    def token(name: str) -> ScoredToken:
        return ScoredToken(NamedToken(0, name, name.encode()), -1.0, [], 0)

    pieces = [
        Piece("", 1, [token("<think>")], deltas=()),
        Piece("", 1, [token("r")], deltas=(ReasoningDelta("r"),)),
        Piece("", 1, [token("a")], deltas=()),
        Piece("ab", 1, [token("b")], deltas=(ContentDelta("ab"),)),
        Piece("", 1, [], "stop", deltas=()),
    ]
    reasoning, said = (each.part for each in parts_of(pieces))
    assert isinstance(reasoning, ReasoningPart)
    assert isinstance(said, TextPart)
    assert [each.token.name for each in said.scored] == ["a", "b"]
