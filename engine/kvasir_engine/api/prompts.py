"""The messages or prompts of a request, and whether they fit. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

from kvasir_engine.api.errors import ApiError, bad_request, unsupported
from kvasir_engine.api.params import MOST_CHOICES
from kvasir_engine.api.ranges import few, shown_number
from kvasir_engine.api.rendering import Rendering
from kvasir_engine.api.schemas import ChatRequest, CompletionRequest, ContentPart
from kvasir_engine.api.tool_history import ToolHistory


def _text(content: str | list[ContentPart] | None, param: str) -> str:
    if content is None:
        raise bad_request(f"Invalid value for '{param}': expected a string, got null.", param, "invalid_type")
    if isinstance(content, str):
        return content
    texts = []
    for place, part in enumerate(content):
        if part.type != "text" or part.text is None:
            raise unsupported(
                f"{param}[{place}]", f"Unsupported content type '{part.type}': only text is supported."
            )
        texts.append(part.text)
    return "\n".join(texts)


def characters_of(messages: Sequence[Mapping[str, Any]]) -> int:
    """The characters of all texts."""
    return sum(len(text) for message in messages for text in message.values() if isinstance(text, str))


def rendering(request: ChatRequest, known: frozenset[str]) -> Rendering:
    """How to render the template, which has the `known` variables. Raises ApiError."""
    continues = bool(request.continue_final_message)
    if continues and request.add_generation_prompt:
        raise bad_request(
            "Setting 'add_generation_prompt' and 'continue_final_message' at the same time is not supported.",
            "continue_final_message",
        )
    variables = dict(request.chat_template_kwargs or {})
    if request.reasoning_effort not in (None, "none"):
        if "reasoning_effort" not in known:
            raise unsupported("reasoning_effort")
        variables.setdefault("reasoning_effort", request.reasoning_effort)
    for name in variables:
        if name not in known:
            at = f"chat_template_kwargs.{name}"
            raise unsupported(
                at, f"Unsupported parameter: '{at}'. This model's chat template has no such variable."
            )
    generation = not continues if request.add_generation_prompt is None else request.add_generation_prompt
    return Rendering(generation, continues, variables)


def chat_messages(request: ChatRequest, most: int) -> list[dict[str, Any]]:
    """The messages, `most` at most, in the form of chat templates. OpenAI's `developer` becomes `system`."""
    if not request.messages:
        raise bad_request(
            "Invalid 'messages': empty array. Expected at least one message.", "messages", "empty_array"
        )
    few("messages", len(request.messages), most)
    messages = []
    history = ToolHistory()
    for place, message in enumerate(request.messages):
        at = f"messages[{place}]"
        role = "system" if message.role == "developer" else message.role
        if role not in ("system", "user", "assistant", "tool"):
            raise unsupported(f"{at}.role", f"Unsupported value: '{at}.role' does not support '{role}'.")
        if message.annotations:
            raise unsupported(f"{at}.annotations")
        content = None
        if message.content is not None or not message.tool_calls:
            content = _text(message.content, f"{at}.content")
        converted = {"role": role, "content": content, **history.more(message, at)}
        if message.reasoning_content is not None:
            if role != "assistant":
                field = f"{at}.reasoning_content"
                raise bad_request(f"Invalid '{field}': only assistants' messages have any.", field)
            converted["reasoning_content"] = message.reasoning_content
        if message.name is not None and role != "tool":
            converted["name"] = message.name
        messages.append(converted)
    return messages


def completion_prompts(request: CompletionRequest, most: int) -> list[str | list[int]]:
    """The prompts: one of at most `most` tokens, or several. Each is a text, or token ids to check."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise bad_request("Invalid 'prompt': empty array.", "prompt", "empty_array")
    kind = type(prompt[0])
    if kind is int and len(prompt) > most:
        raise too_long(len(prompt), most, "prompt")
    if kind is not int and len(prompt) * max(request.n or 1, request.best_of or 1) > MOST_CHOICES:
        raise bad_request(
            f"Too many choices: prompts times 'n' or 'best_of' may be {MOST_CHOICES} at most.", "prompt"
        )
    if any(type(each) is not kind for each in prompt):
        raise bad_request(
            "Invalid 'prompt': expected a string, or a list of strings, of tokens, or of lists of tokens.",
            "prompt",
            "invalid_type",
        )
    if kind is int:
        return [[each for each in prompt if isinstance(each, int)]]
    return [each for each in prompt if not isinstance(each, int)]


def check_tokens(tokens: list[int], vocab_size: int, most: int, param: str = "prompt") -> None:
    """Raise ApiError unless these are token ids of the model, at most `most`."""
    if len(tokens) > most:
        raise too_long(len(tokens), most, param)
    for token in (min(tokens), max(tokens)) if tokens else ():
        if not 0 <= token < vocab_size:
            raise bad_request(f"Invalid '{param}': {shown_number(token)} is not a token of this model.", param)


def room(prompt_tokens: int, max_tokens: int | None, max_length: int, param: str) -> int:
    """How many tokens may be generated after the prompt. Raises ApiError when prompt and answer do not fit."""
    if prompt_tokens == 0:
        raise bad_request(
            f"Invalid '{param}': it has no tokens; a prompt needs one at least.", param, "empty_prompt"
        )
    over = _over(prompt_tokens, max_tokens, max_length, param)
    if over is not None:
        raise over
    return max_length - prompt_tokens if max_tokens is None else max_tokens


def too_long(tokens: int, max_length: int, param: str) -> ApiError:
    """The error for a prompt of at least `tokens` tokens."""
    what = "messages" if param == "messages" else "prompt"
    text = (
        f"This model's maximum context length is {max_length} tokens. However, your {what} resulted in {tokens} "
        f"tokens or more. Please reduce the length of the {what}."
    )
    return bad_request(text, param, "context_length_exceeded")


def _over(prompt_tokens: int, max_tokens: int | None, max_length: int, param: str) -> ApiError | None:
    limit = f"This model's maximum context length is {max_length} tokens. However, "
    what = "messages" if param == "messages" else "prompt"
    if prompt_tokens >= max_length:
        text = f"{limit}your {what} resulted in {prompt_tokens} tokens. Please reduce the length of the {what}."
    elif max_tokens is not None and prompt_tokens + max_tokens > max_length:
        text = (
            f"{limit}you requested {prompt_tokens + max_tokens} tokens ({prompt_tokens} in the {what}, "
            f"{max_tokens} in the completion). Please reduce the length of the {what} or completion."
        )
    else:
        return None
    return bad_request(text, param, "context_length_exceeded")
