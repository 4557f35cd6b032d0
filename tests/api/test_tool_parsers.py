"""What is read of models' answers, however their text is cut: golden conversations of every format."""

import itertools
import random
from collections.abc import Callable, Iterator

import pytest
from conversations import FORMATS, NAMES, Conversation, conversations, reasoned, reasoned_harmony

from kvasir_engine.api.tools.formats import AnswerParser, OutputFormat
from kvasir_engine.api.tools.thinking import MISTRAL_THINK, THINK
from kvasir_engine.api.tools.types import Delta, ParsedMessage, ToolCallBegin, joined

Make = Callable[[], AnswerParser]
AT_LEAST = 60


def parser_of(format: OutputFormat, begun: bool | None = None, names: frozenset[str] | None = NAMES) -> Make:
    def make() -> AnswerParser:
        counter = itertools.count()
        return format.parser(lambda: f"call_{next(counter)}", names, begun)

    return make


def read(make: Make, text: str, cuts: list[int]) -> tuple[list[Delta], int]:
    parser = make()
    deltas: list[Delta] = []
    for start, end in itertools.pairwise([0, *cuts, len(text)]):
        deltas += parser.push(text[start:end])
    deltas += parser.end()
    return deltas, parser.completed


def whole(make: Make, text: str) -> ParsedMessage:
    """The message, which is the same however the text is cut."""
    deltas, completed = read(make, text, [])
    message = joined(deltas)
    rng = random.Random(len(text))
    places = range(1, len(text))
    every = [*places] if len(text) <= 80 else rng.sample(places, 12)
    cuts = [list(places), *([at] for at in every)]
    cuts += [sorted(rng.sample(places, rng.randint(1, min(8, len(places))))) for _ in range(4) if places]
    for some in cuts:
        again, count = read(make, text, some)
        assert joined(again) == message, (text, some)
        assert count == completed, (text, some)
    return message


def check(make: Make, conversation: Conversation) -> None:
    message = whole(make, conversation.text)
    assert message.content == conversation.content, conversation.text
    assert message.reasoning == conversation.reasoning, conversation.text
    read_calls = [(call.name, call.arguments) for call in message.tool_calls]
    assert read_calls == [(call.name, call.written) for call in conversation.calls], conversation.text
    assert len({call.id for call in message.tool_calls}) == len(message.tool_calls)


def output(format: str, reasoning: str = "none") -> OutputFormat:
    return OutputFormat(format.split()[0], reasoning)  # type: ignore[arg-type]


@pytest.mark.parametrize("format", FORMATS)
def test_conversations_are_read_the_same_however_they_are_cut(format: str) -> None:
    told = list(conversations(format))
    assert len({each.text for each in told}) >= AT_LEAST
    for conversation in told:
        check(parser_of(output(format)), conversation)


@pytest.mark.parametrize(
    ("reasoning", "begun"),
    [("qwen3", None), ("qwen3", True), ("deepseek_r1", None), ("mistral", None), ("mistral", True)],
)
def test_reasoning_is_told_from_the_answer(reasoning: str, begun: bool | None) -> None:
    markers = MISTRAL_THINK if reasoning == "mistral" else THINK
    within = begun is True or reasoning == "deepseek_r1"
    told = list(reasoned(markers.open, markers.close, within))
    assert len({each.text for each in told}) >= AT_LEAST
    for conversation in told:
        check(parser_of(output("hermes", reasoning), begun), conversation)


def test_analysis_is_reasoning() -> None:
    told = list(reasoned_harmony())
    assert len({each.text for each in told}) >= AT_LEAST
    for conversation in told:
        check(parser_of(output("openai", "openai")), conversation)


@pytest.mark.parametrize("format", FORMATS)
def test_a_call_is_announced_once_its_name_and_arguments_are_certain(format: str) -> None:
    for conversation in conversations(format):
        parser = parser_of(output(format))()
        begun = 0
        for character in conversation.text:
            begun += sum(isinstance(each, ToolCallBegin) for each in parser.push(character))
        assert begun == len(conversation.calls)


V3 = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>"


@pytest.mark.parametrize(
    ("format", "text", "content", "calls"),
    [
        # what was not announced is content, with its markers
        ("hermes", "<tool_call>oops</tool_call> x", "<tool_call>oops</tool_call> x", []),
        ("hermes", '<tool_call>{"name": "search", "argu', '<tool_call>{"name": "search", "argu', []),
        ("hermes", '<tool_call>{"name": 5, "arguments": {}}', '<tool_call>{"name": 5, "arguments": {}}', []),
        ("hermes", '<tool_call>{"name": "\\ud800"}', '<tool_call>{"name": "\\ud800"}', []),
        ("hermes", 'a <tool_call>{"x": 1}</tool_call>', 'a <tool_call>{"x": 1}</tool_call>', []),
        ("hermes", "<tool_call> [ 1 ]", "<tool_call> [ 1 ]", []),
        ("hermes", "<tool_cal", "<tool_cal", []),
        # what was announced stays a call, with all that came
        ("hermes", '<tool_call>{"name":"f","arguments":{"a":1,}}</tool_call>!', "!", [("f", '{"a":1,}}')]),
        ("hermes", '<tool_call>{"name":"f","arguments":{"a": tr', None, [("f", '{"a": tr')]),
        ("hermes", '<tool_call>{"name":"f","arguments":{"a":1}, oops}</tool_call>', "oops}", [("f", '{"a":1}')]),
        ("hermes", '<tool_call>{"name":"f","arguments":{}}}</tool_call>', "}", [("f", "{}")]),
        ("hermes", '<tool_call>{"name":"f","arguments":{}}', None, [("f", "{}")]),
        ("hermes", '<tool_call>{"name":"f","arguments":{}} and', " and", [("f", "{}")]),
        # other forms of arguments
        ("hermes", '<tool_call>{"name":"f"}</tool_call>', None, [("f", "{}")]),
        ("hermes", '<tool_call>{"name":"f","arguments":null}</tool_call>', None, [("f", "{}")]),
        ("hermes", '<tool_call>{"name":"f","arguments":"{\\"a\\": 1}"}</tool_call>', None, [("f", '{"a": 1}')]),
        ("hermes", '<tool_call>{"name":"f","arguments":"x"}</tool_call>', None, [("f", '"x"')]),
        ("hermes", '<tool_call>{"name":"f","arguments":3}</tool_call>', None, [("f", "3")]),
        ("hermes", '<tool_call>{"name":"f","arguments":{"a":"x\ny"}}</tool_call>', None, [("f", '{"a":"x\\ny"}')]),
        ("hermes", '<tool_call>{"name":"f","arguments":{}}</tool_call>\nso', "\nso", [("f", "{}")]),
        # a bare object is a call only of a tool that there is
        ("llama3_json", '{"name": "nobody", "parameters": {}}', '{"name": "nobody", "parameters": {}}', []),
        ("llama3_json", '{"city": "Bern"}', '{"city": "Bern"}', []),
        ("llama3_json", '{"name": "search"}', '{"name": "search"}', []),
        ("llama3_json", '<|python_tag|>{"name": "x", "parameters": {}}', None, [("x", "{}")]),
        ("llama3_json", "<|python_tag|>x.call(a=1)", "<|python_tag|>x.call(a=1)", []),
        (
            "llama3_json",
            'Yes: {"name": "search", "parameters": {}}',
            'Yes: {"name": "search", "parameters": {}}',
            [],
        ),
        ("llama3_json", '{"name": "search", "parameters": {}}; no', "; no", [("search", "{}")]),
        ("json", '[{"name": "search", "arguments": {}}, 3]', ", 3]", [("search", "{}")]),
        ("json", "```json\n[1]\n```", "```json\n[1]\n```", []),
        ("json", '```\n{"name": "search", "arguments": {}}\n``` done', " done", [("search", "{}")]),
        ("json", "[", "[", []),
        ("mistral", "[TOOL_CALLS] what?", "[TOOL_CALLS] what?", []),
        ("mistral", "[TOOL_CALLS]search", "[TOOL_CALLS]search", []),
        ("mistral", "[TOOL_CALLS]search[ARGS]oops", "[TOOL_CALLS]search[ARGS]oops", []),
        ("mistral", '[TOOL_CALLS]f{"a": 1}', None, [("f", '{"a": 1}')]),
        ("mistral", '[TOOL_CALLS]f[ARGS]{"a" 1}[TOOL_CALLS]g[ARGS]{}', None, [("f", '{"a" 1}'), ("g", "{}")]),
        ("mistral", "[TOOL_CALLS]f[ARGS]{} so", " so", [("f", "{}")]),
        ("mistral", "[TOOL_CALLS][]", "[TOOL_CALLS][]", []),
        ("deepseek_v3", f"{V3}f", f"{V3}f", []),
        ("deepseek_v3", f"{V3}f<｜tool▁call▁end｜>", f"{V3}f<｜tool▁call▁end｜>", []),
        ("deepseek_v3", f"{V3}f<｜tool▁sep｜>x", f"{V3}f<｜tool▁sep｜>x", []),
        ("deepseek_v3", f'{V3}f<｜tool▁sep｜>{{"a" 1}}<｜tool▁call▁end｜>', None, [("f", '{"a" 1}')]),
        ("deepseek_v3", f"{V3}function<｜tool▁sep｜>{{}}<｜tool▁call▁end｜>", None, [("function", "{}")]),
        ("deepseek_v3", f"{V3}function<｜tool▁sep｜>f\n```{{}}```", None, [("f", "{}")]),
        ("deepseek_v3", "<｜tool▁calls▁begin｜>no", "<｜tool▁calls▁begin｜>no", []),
        ("openai", "no channels", "no channels", []),
        ("openai", "<|channel|>fin", "<|channel|>fin", []),
        ("openai", '<|channel|>commentary to=functions.f<|message|>{"a"', None, [("f", '{"a"')]),
        ("openai", "<|channel|>final<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b", "a\nb", []),
        ("openai", "<|channel|>analysis<|message|>thought<|return|>", "thought", []),
        ("openai", "<|channel|>commentary to=python<|message|>1+1<|call|>", None, [("python", "1+1")]),
        ("pythonic", "[1, 2]", "[1, 2]", []),
        ("pythonic", "[nobody(a=1)]", "[nobody(a=1)]", []),
        ("pythonic", "[search(a=b)]", "[search(a=b)]", []),
        ("pythonic", "[search(1)]", "[search(1)]", []),
        ("pythonic", "[search(a=1), oops", ", oops", [("search", '{"a": 1}')]),
        ("pythonic", "[search(a=1", "[search(a=1", []),
        ("pythonic", "[search()] bye", " bye", [("search", "{}")]),
    ],
)
def test_what_is_malformed_loses_no_text(
    format: str, text: str, content: str | None, calls: list[tuple[str, str]]
) -> None:
    message = whole(parser_of(output(format)), text)
    assert message.content == content
    assert [(call.name, call.arguments) for call in message.tool_calls] == calls


@pytest.mark.parametrize(
    ("reasoning", "begun", "text", "thought", "content"),
    [
        ("qwen3", None, "no thought", None, "no thought"),
        ("qwen3", None, " <thi", None, " <thi"),
        ("qwen3", None, "a <think>b</think>", None, "a <think>b</think>"),
        ("qwen3", None, "<think>cut </thi", "cut </thi", None),
        ("qwen3", None, "<think>\n\n</think>\n\nHi", None, "Hi"),
        ("qwen3", True, "b</think>c", "b", "c"),
        ("qwen3", True, "<think>b</think>c", "b", "c"),
        ("qwen3", False, "<think>b</think>c", None, "<think>b</think>c"),
        ("deepseek_r1", None, "all of it", "all of it", None),
        ("deepseek_r1", False, "all of it", None, "all of it"),
        ("mistral", None, "[THINK]a b[/THINK]c", "a b", "c"),
        ("none", None, "<think>b</think>c", None, "<think>b</think>c"),
        (
            "openai",
            None,
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b",
            "a",
            "b",
        ),
    ],
)
def test_what_is_reasoning(
    reasoning: str, begun: bool | None, text: str, thought: str | None, content: str | None
) -> None:
    message = whole(parser_of(output("none", reasoning), begun, None), text)
    assert (message.reasoning, message.content, message.tool_calls) == (thought, content, ())


def fragments() -> Iterator[str]:
    yield from ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", "```json")
    yield from ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>")
    yield from (
        "<｜tool▁calls▁end｜>",
        "function",
        "search",
        '{"name": "search", ',
        '"arguments": ',
        "{}",
        "}",
        "{",
    )
    yield from ("<|channel|>", "<|message|>", "<|start|>assistant", "<|end|>", "<|call|>", "analysis", "final")
    yield from (
        " to=functions.search",
        "<think>",
        "</think>",
        "\n",
        " ",
        ",",
        ";",
        "]",
        "[",
        '"',
        "x",
        "search(",
        ")",
    )
    yield from ("<function=", "<parameter=", "</parameter>", "</function>", ">", "<arg_key>", "</arg_key>")
    yield from ("<arg_value>", "</arg_value>", "{", "</tool_call>")


@pytest.mark.parametrize(
    "format",
    ["deepseek_v3", "glm45", "hermes", "json", "llama3_json", "mistral", "openai", "pythonic", "qwen3_coder"],
)
def test_any_mixture_of_markers_is_read_the_same_however_it_is_cut(format: str) -> None:
    rng = random.Random(format)
    parts = list(fragments())
    for _ in range(300):
        text = "".join(rng.choices(parts, k=rng.randint(1, 12)))
        reasoning = "openai" if format == "openai" else rng.choice(["none", "qwen3"])
        make = parser_of(output(format, reasoning), rng.choice([None, True]))
        deltas, _ = read(make, text, [])
        for _ in range(4):
            places = range(1, len(text))
            cuts = sorted(rng.sample(places, rng.randint(0, min(12, len(places)))))
            assert joined(read(make, text, cuts)[0]) == joined(deltas), (text, cuts)
