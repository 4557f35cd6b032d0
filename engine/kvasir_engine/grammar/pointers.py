"""JSON pointers (RFC 6901) within a schema."""

from typing import Any


def pointer(path: str, key: str | int) -> str:
    """The pointer of `key` below `path`."""
    return f"{path}/{str(key).replace('~', '~0').replace('/', '~1')}"


def at(root: Any, path: str) -> Any:
    """The value at `path`. Raises KeyError."""
    found = root
    for part in path.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        try:
            found = found[int(key)] if isinstance(found, list) else found[key]
        except (TypeError, ValueError, IndexError, KeyError):
            raise KeyError(path) from None
    return found
