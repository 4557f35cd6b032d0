"""Hermes' and Qwen's: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, or an array of such objects."""

from kvasir_engine.api.tools.base import NewId
from kvasir_engine.api.tools.json_calls import JsonCallParser, JsonFormat

OPEN, CLOSE = "<tool_call>", "</tool_call>"


def parser(new_id: NewId, names: frozenset[str]) -> JsonCallParser:
    """A parser of one message."""
    return JsonCallParser(new_id, names, JsonFormat(opens=(OPEN,), closes=(CLOSE,)))
