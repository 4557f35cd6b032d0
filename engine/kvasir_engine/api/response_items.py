"""Converts items of OpenAI's Responses API to chat messages; consecutive items of an answer are one
message. Pure.
"""

from collections.abc import Sequence

from kvasir_engine.api.errors import bad_request, missing, unsupported
from kvasir_engine.api.response_schemas import InputItem, InputText, ResponsesRequest
from kvasir_engine.api.turns import Turns

_ROLES = ("user", "assistant", "system", "developer")
_PARTS = ("input_text", "output_text", "text")


def turns_of(body: ResponsesRequest) -> Turns:
    """The whole conversation. Raises ApiError."""
    turns = Turns("input")
    if body.instructions is not None:
        turns.begin("system", "instructions").texts.append(body.instructions)
    if isinstance(body.input, str):
        turns.begin("user", "input").texts.append(body.input)
        return turns
    if not body.input:
        raise bad_request("Invalid 'input': empty array. Expected at least one item.", "input", "empty_array")
    for place, item in enumerate(body.input):
        _read(turns, item, f"input[{place}]")
    return turns


def _read(turns: Turns, item: InputItem, at: str) -> None:
    match item.type:
        case "message":
            _message(turns, item, at)
        case "reasoning":
            _reasoning(turns, item, at)
        case "function_call":
            _call(turns, item, at)
        case "function_call_output":
            _output(turns, item, at)
        case _:
            raise unsupported(f"{at}.type", f"Unsupported value: '{at}.type' does not support '{item.type[:100]}'.")


def _message(turns: Turns, item: InputItem, at: str) -> None:
    if item.role is None:
        raise missing(f"{at}.role")
    if item.role not in _ROLES:
        raise unsupported(f"{at}.role", f"Unsupported value: '{at}.role' does not support '{item.role[:100]}'.")
    if item.content is None:
        raise missing(f"{at}.content")
    text = _text(item.content, f"{at}.content")
    last = turns.last
    goes_on = item.role == "assistant" and last is not None and (last.calls or not last.texts)
    turn = turns.of("assistant", at) if goes_on else turns.begin(item.role, at)
    turn.texts.append(text)


def _reasoning(turns: Turns, item: InputItem, at: str) -> None:
    if item.encrypted_content is not None:
        name = f"{at}.encrypted_content"
        raise unsupported(name, f"Unsupported parameter: '{name}': this server encrypts no reasoning.")
    if item.content is None and item.summary is None:
        raise missing(f"{at}.content")
    text = _text(item.content or [], f"{at}.content", ("reasoning_text",))
    text = text or _text(item.summary or [], f"{at}.summary", ("summary_text",))
    turns.of("assistant", at).thoughts.append(text)


def _call(turns: Turns, item: InputItem, at: str) -> None:
    if item.call_id is None:
        raise missing(f"{at}.call_id")
    if item.name is None:
        raise missing(f"{at}.name")
    if item.arguments is None:
        raise missing(f"{at}.arguments")
    call = turns.call(at, item.call_id, item.name, item.arguments)
    turns.names[f"{call}.id"] = f"{at}.call_id"


def _output(turns: Turns, item: InputItem, at: str) -> None:
    if item.call_id is None:
        raise missing(f"{at}.call_id")
    if item.output is None:
        raise missing(f"{at}.output")
    message = turns.result(at, item.call_id, _text(item.output, f"{at}.output"))
    turns.names[f"{message}.tool_call_id"] = f"{at}.call_id"


def _text(content: str | list[InputText], at: str, kinds: Sequence[str] = _PARTS) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for place, part in enumerate(content):
        if part.type not in kinds or part.text is None:
            where = f"{at}[{place}]"
            raise unsupported(where, f"Unsupported '{where}' of type '{part.type[:100]}': only text is supported.")
        texts.append(part.text)
    return "\n".join(texts)
