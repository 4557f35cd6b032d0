"""The path and reason of a problem in a pod template."""

from typing import Any

import msgspec

Path = tuple[str | int, ...]
Object = dict[str, Any]


class Problem(msgspec.Struct, frozen=True):
    """One reason why a template is refused, and the path of its field from the template on."""

    path: Path
    reason: str


def shown(value: object) -> str:
    """A value as it stands in a sentence."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
