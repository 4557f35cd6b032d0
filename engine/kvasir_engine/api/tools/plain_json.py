"""No model's own: an answer that is one object `{"name": ..., "arguments": {...}}` or an array, perhaps in a fence."""

from kvasir_engine.api.tools.base import NewId
from kvasir_engine.api.tools.json_calls import JsonCallParser, JsonFormat


def parser(new_id: NewId, names: frozenset[str]) -> JsonCallParser:
    """A parser of one message."""
    return JsonCallParser(new_id, names, JsonFormat(bare=True, fence=True))
