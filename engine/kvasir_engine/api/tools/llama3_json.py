"""Llama 3's: an answer that is `{"name": ..., "parameters": {...}}`, or that behind `<|python_tag|>`.

Several have `;` between them.
"""

from kvasir_engine.api.tools.base import NewId
from kvasir_engine.api.tools.json_calls import JsonCallParser, JsonFormat

TAG = "<|python_tag|>"


def parser(new_id: NewId, names: frozenset[str]) -> JsonCallParser:
    """A parser of one message."""
    return JsonCallParser(new_id, names, JsonFormat(opens=(TAG,), separators=";", bare=True))
