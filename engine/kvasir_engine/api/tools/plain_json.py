"""No model's own: answers that are `{"name": ..., "arguments": {...}}`, or an array of them, in a fence or not."""

from kvasir_engine.api.tools.base import NewId
from kvasir_engine.api.tools.json_calls import JsonCallParser, JsonFormat


def parser(new_id: NewId, names: frozenset[str]) -> JsonCallParser:
    """A parser of one message."""
    return JsonCallParser(new_id, names, JsonFormat(bare=True, fence=True))
