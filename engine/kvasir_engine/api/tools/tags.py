"""Parts of structural tags, as `grammar/structural_tags.py` reads them. Pure."""

from typing import Any

Tag = dict[str, Any]


def const(text: str) -> Tag:
    return {"type": "const_string", "value": text}


def sequence(*elements: Tag) -> Tag:
    return {"type": "sequence", "elements": list(elements)}


def either(*elements: Tag) -> Tag:
    return {"type": "or", "elements": list(elements)}


def tag(begin: str, schema: dict[str, Any], end: str) -> Tag:
    return {"type": "tag", "begin": begin, "content": {"type": "json_schema", "json_schema": schema}, "end": end}


def several(tags: list[Tag], separator: str, many: bool) -> Tag:
    return {
        "type": "tags_with_separator",
        "tags": tags,
        "separator": separator,
        "at_least_one": True,
        "stop_after_first": not many,
    }
