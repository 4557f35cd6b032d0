"""Where in a pod template something is wrong, and what."""

from typing import Any

import msgspec

Path = tuple[str | int, ...]
Object = dict[str, Any]


class Problem(msgspec.Struct, frozen=True):
    """One reason why a template is refused, and the field it is about, from the template on."""

    path: Path
    reason: str


def shown(value: object) -> str:
    """A value within a sentence."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
