"""What an installation without one of its extras says, in place of a traceback."""

import importlib.metadata
import re

from kvasir_engine.errors import UserError

_OF_EXTRA = re.compile(r"(?P<package>[\w.-]+).*\bextra\s*==\s*[\"'](?P<extra>[\w-]+)[\"']")


class ExtraMissing(UserError):
    """A command needs a package that comes with an extra which is not installed; the message says which."""


def explain(
    error: ModuleNotFoundError, preferred: str, requirements: list[str] | None = None
) -> ExtraMissing | None:
    """The error for a module that an extra of Kvasir would bring, or `None`: then it is a fault, not a choice.

    `preferred`: the extra to name of several. `requirements`: the distribution's own, by default as installed.
    """
    if requirements is None:
        try:
            requirements = importlib.metadata.requires("kvasir") or []
        except importlib.metadata.PackageNotFoundError:
            return None
    module = _normal((error.name or "").partition(".")[0])
    found = [
        match["extra"] for each in requirements if (match := _OF_EXTRA.match(each)) and _normal(match[1]) == module
    ]
    if not found:
        return None
    extra = preferred if preferred in found else found[0]
    return ExtraMissing(
        f"{module} is not installed: it comes with `pip install kvasir[{extra}]`, and is in the {extra}'s image"
    )


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
