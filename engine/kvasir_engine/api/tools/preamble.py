"""Tools for a chat template that knows none: all that is of tools becomes text of ordinary messages. Pure.

The texts are in the format of `hermes.py`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from kvasir_engine.api.tools.hermes import CLOSE, OPEN

_INTRODUCTION = f"""\
You can call functions. Their descriptions, as JSON, one a line:
{{tools}}

To call a function, answer with its name and its arguments as JSON, once for each call, in this form:
{OPEN}
{{{{"name": "<name>", "arguments": {{{{<arguments>}}}}}}}}
{CLOSE}"""


def with_tools(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages without roles or fields of tools, a system message about `tools`, if any, first."""
    plain = [_plain(message) for message in messages]
    if not tools:
        return plain
    lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    introduction = _INTRODUCTION.format(tools=lines)
    if plain and plain[0]["role"] == "system":
        return [{**plain[0], "content": f"{plain[0]['content']}\n\n{introduction}"}, *plain[1:]]
    return [{"role": "system", "content": introduction}, *plain]


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = message.get("tool_calls")
    if not calls:
        return dict(message)
    texts = [message["content"]] if message.get("content") else []
    texts += [f"{OPEN}\n{json.dumps(call['function'], ensure_ascii=False)}\n{CLOSE}" for call in calls]
    return {"role": "assistant", "content": "\n".join(texts)}
