"""Answers of models in every format of tool calls, and what has to be read of them: written, not parsed."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

NAMES = frozenset({"get_weather", "search", "run-it_2"})
CONTENTS = (
    "",
    "Let me look that up.",
    "Ich schaue nach: 你好 🌍, a < b, {x} [y], <tool",
    "First line.\n\n```python\nprint({'name': 1})\n```",
)
ARGUMENTS: tuple[dict[str, Any], ...] = (
    {},
    {"city": "Zürich"},
    {"a": 1, "b": -2.5e3, "c": None, "d": True, "e": False},
    {"nested": {"list": [1, [2, {"k": "v"}], []], "e": {}}, "last": 0},
    {"text": 'quote " backslash \\ slash / line \n tab \t end'},
    {"markers": "</tool_call> [TOOL_CALLS] ``` <tool_call> }} ]]", "n": 12},
    {"unicode": "日本語 😀 \u2028", "ключ": "é"},
    {"empty": "", "brackets": "}{][)(", "name": "arguments"},
    {"long": "word " * 40},
    {"name": {"name": "x", "arguments": {}}},
)
_LISTS: tuple[tuple[int, ...], ...] = (
    *((place,) for place in range(len(ARGUMENTS))),
    (0, 1),
    (1, 0),
    (2, 3, 4),
    (5, 5),
    (7, 6),
    (9, 1, 8),
)
_STYLES: tuple[Callable[[Any], str], ...] = (
    lambda value: json.dumps(value, ensure_ascii=False),
    lambda value: json.dumps(value, ensure_ascii=False, separators=(",", ":")),
    lambda value: json.dumps(value, ensure_ascii=True, indent=2),
)


@dataclass(frozen=True)
class Call:
    """A call; `written` is its arguments as the model writes them."""

    name: str
    written: str


@dataclass(frozen=True)
class Conversation:
    """An answer, and its parts."""

    text: str
    content: str | None
    calls: tuple[Call, ...]
    reasoning: str | None = None


Writer = Callable[[Sequence[Call]], str]


def _object(call: Call, key: str = "arguments") -> str:
    return f'{{"name": {json.dumps(call.name)}, "{key}": {call.written}}}'


def _hermes(calls: Sequence[Call]) -> str:
    return "\n".join(f"<tool_call>\n{_object(call)}\n</tool_call>" for call in calls)


def _hermes_reversed(calls: Sequence[Call]) -> str:
    return "".join(
        f'<tool_call>{{"arguments":{call.written},"id":"x1", "name":"{call.name}"}}</tool_call>' for call in calls
    )


def _hermes_array(calls: Sequence[Call]) -> str:
    return f"<tool_call>[{', '.join(map(_object, calls))}]</tool_call>"


def _llama(calls: Sequence[Call]) -> str:
    return "; ".join(_object(call, "parameters") for call in calls)


def _llama_tag(calls: Sequence[Call]) -> str:
    return "<|python_tag|>" + _llama(calls)


def _mistral_array(calls: Sequence[Call]) -> str:
    return f"[TOOL_CALLS] [{', '.join(map(_object, calls))}]"


def _mistral(calls: Sequence[Call]) -> str:
    return "".join(f"[TOOL_CALLS]{call.name}[ARGS]{call.written}" for call in calls)


def _mistral_ids(calls: Sequence[Call]) -> str:
    return "".join(f"[TOOL_CALLS]{call.name}[CALL_ID]a1B2c3D4e[ARGS] {call.written}" for call in calls)


def _deepseek_v3(calls: Sequence[Call]) -> str:
    written = (
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{call.name}\n```json\n{call.written}\n```<｜tool▁call▁end｜>"
        for call in calls
    )
    return "<｜tool▁calls▁begin｜>" + "\n".join(written) + "<｜tool▁calls▁end｜>"


def _deepseek_v31(calls: Sequence[Call]) -> str:
    written = (f"<｜tool▁call▁begin｜>{call.name}<｜tool▁sep｜>{call.written}<｜tool▁call▁end｜>" for call in calls)
    return "<｜tool▁calls▁begin｜>" + "".join(written) + "<｜tool▁calls▁end｜>"


def _json_array(calls: Sequence[Call]) -> str:
    return f"[{', '.join(map(_object, calls))}]"


def _json(calls: Sequence[Call]) -> str:
    return _object(calls[0]) if len(calls) == 1 else _json_array(calls)


def _json_fence(calls: Sequence[Call]) -> str:
    return f"```json\n{_json(calls)}\n```"


def _harmony(calls: Sequence[Call]) -> str:
    return "<|start|>assistant".join(
        f"<|channel|>commentary to=functions.{call.name} <|constrain|>json<|message|>{call.written}<|call|>"
        for call in calls
    )


def _harmony_role(calls: Sequence[Call]) -> str:
    return "<|start|>assistant".join(
        f" to=functions.{call.name}<|channel|>commentary json<|message|>{call.written}<|call|>" for call in calls
    )


def _python(calls: Sequence[Call]) -> str:
    def one(call: Call) -> str:
        arguments = json.loads(call.written)
        return f"{call.name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"

    return f"[{', '.join(map(one, calls))}]"


def _python_spaced(calls: Sequence[Call]) -> str:
    return _python(calls).replace("[", "[ ", 1).replace("(", "( ", 1) + "\n"


def _python_quoted(calls: Sequence[Call]) -> str:
    def one(call: Call) -> str:
        arguments = json.loads(call.written).items()
        return call.name + "(" + ",\n".join(f"{key} = {_quoted(value)}" for key, value in arguments) + ")"

    return f"[{' , '.join(map(one, calls))}]"


def _quoted(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _python_marked(calls: Sequence[Call]) -> str:
    return f"<|python_start|>{_python(calls)}<|python_end|>"


def _qwen3_coder(calls: Sequence[Call], line: str = "\n", close: str = "\n</tool_call>") -> str:
    def one(call: Call) -> str:
        arguments = "".join(
            f"<parameter={key}>\n{_bare(value)}\n</parameter>{line}"
            for key, value in json.loads(call.written).items()
        )
        return f"<tool_call>{line}<function={call.name}>{line}{arguments}</function>{close}"

    return "\n".join(map(one, calls))


def _qwen3_coder_compact(calls: Sequence[Call]) -> str:
    return _qwen3_coder(calls, "", "</tool_call>")


def _qwen3_coder_unclosed(calls: Sequence[Call]) -> str:
    return _qwen3_coder(calls, close="")


def _glm45(calls: Sequence[Call], line: str = "\n") -> str:
    def one(call: Call) -> str:
        arguments = "".join(
            f"<arg_key>{key}</arg_key>{line}<arg_value>{_bare(value)}</arg_value>{line}"
            for key, value in json.loads(call.written).items()
        )
        return f"<tool_call>{call.name}{line}{arguments}</tool_call>"

    return "\n".join(map(one, calls))


def _glm45_compact(calls: Sequence[Call]) -> str:
    return _glm45(calls, "")


def _bare(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


_WRITERS: dict[str, tuple[tuple[Writer, ...], bool]] = {
    "hermes": ((_hermes, _hermes_reversed, _hermes_array), True),
    "llama3_json": ((_llama, _llama_tag), False),
    "llama3_json behind text": ((_llama_tag,), True),
    "mistral": ((_mistral, _mistral_array, _mistral_ids), True),
    "deepseek_v3": ((_deepseek_v3, _deepseek_v31), True),
    "json": ((_json, _json_array, _json_fence), False),
    "openai": ((_harmony, _harmony_role), True),
    "qwen3_coder": ((_qwen3_coder, _qwen3_coder_compact, _qwen3_coder_unclosed), True),
    "glm45": ((_glm45, _glm45_compact), True),
    "pythonic": ((_python, _python_marked, _python_spaced, _python_quoted), False),
}
FORMATS = tuple(_WRITERS)


def conversations(format: str) -> Iterator[Conversation]:
    """Those of one format: every list of calls in every style, in turn in each way to write them and behind each
    content.
    """
    writers, with_content = _WRITERS[format]
    turn = 0
    for places in _LISTS:
        if format == "pythonic" and any(not _python_writes(ARGUMENTS[place]) for place in places):
            continue
        for style in _STYLES:
            for content in CONTENTS if with_content else [""] * 3:
                turn += 1
                names = sorted(NAMES - {"run-it_2"} if format == "pythonic" else NAMES)
                calls = tuple(
                    Call(names[(turn + at) % len(names)], style(ARGUMENTS[place]))
                    for at, place in enumerate(places)
                )
                yield _conversation(format, writers[turn % len(writers)], calls, content, turn)
    for content in CONTENTS[1:]:
        text = f"<|channel|>final<|message|>{content}" if format == "openai" else content
        yield Conversation(text, content, ())


def _conversation(format: str, write: Writer, calls: tuple[Call, ...], content: str, turn: int) -> Conversation:
    text = write(calls)
    if format in ("pythonic", "qwen3_coder", "glm45"):
        calls = tuple(Call(call.name, json.dumps(json.loads(call.written), ensure_ascii=False)) for call in calls)
    if not content:
        return Conversation(text, None, calls)
    if format == "openai":
        return Conversation(
            f"<|channel|>commentary<|message|>{content}<|end|><|start|>assistant{text}", content, calls
        )
    return Conversation(content + ("\n\n" if turn % 2 else "") + text, content, calls)


def _python_writes(arguments: dict[str, Any]) -> bool:
    return all(key.isidentifier() for key in arguments)


THOUGHTS = (
    "I should be quick.",
    'First, the user wants {"a": 1}.\n\nThen <tool_call> is no call here, nor is </thin or [/THIN.',
    "考える… 🤔",
    "",
)


def reasoned(open: str, close: str, begun: bool) -> Iterator[Conversation]:
    """Thoughts between two markers, the first of them in the prompt if it has begun, and Hermes' conversations."""
    for turn, conversation in enumerate(conversations("hermes")):
        thought = THOUGHTS[turn % len(THOUGHTS)].replace("<tool_call>", "a call")
        space = ("", "\n", "\n\n")[turn % 3]
        opening = "" if begun else open
        text = f"{opening}{space}{thought}{space}{close}{space}{conversation.text}"
        yield Conversation(text, conversation.content, conversation.calls, thought or None)


def reasoned_harmony() -> Iterator[Conversation]:
    """Thoughts in the analysis channel, and harmony's conversations."""
    for turn, conversation in enumerate(conversations("openai")):
        thought = THOUGHTS[turn % len(THOUGHTS)]
        text = f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant{conversation.text}"
        yield Conversation(text, conversation.content, conversation.calls, thought or None)
