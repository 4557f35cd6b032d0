"""Pages of lists: `limit` of them, `after` one of them."""

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

from kvasir_engine.api.errors import bad_request
from kvasir_engine.api.ranges import within


class HasId(Protocol):
    @property
    def id(self) -> str: ...


T = TypeVar("T", bound=HasId)


def page_limit(query: Mapping[str, str], usual: int, most: int) -> int:
    """The query's `limit`, `usual` where it has none, `most` at most. Raises ApiError."""
    text = query.get("limit", str(usual))
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise bad_request("Invalid value for 'limit': expected a number.", "limit")
    within("limit", int(text), 1, most)
    return int(text)


def check_query(query: Mapping[str, str], known: Sequence[str]) -> None:
    """Raise ApiError for an unknown parameter."""
    for name in query:
        if name not in known:
            raise bad_request(f"Unknown parameter: '{name[:100]}'.", name, "unknown_parameter")


def page(items: Sequence[T], after: str | None, limit: int) -> tuple[list[T], bool]:
    """The next items, and whether there are more. Raises ApiError."""
    start = 0
    if after is not None:
        places = [place for place, each in enumerate(items) if each.id == after]
        if not places:
            raise bad_request(f"Invalid 'after': there is no '{after[:100]}'.", "after")
        start = places[0] + 1
    return list(items[start : start + limit]), len(items) > start + limit
