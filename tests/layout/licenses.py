"""What the images contain of others, and under which licence: `make licenses` writes docs/licenses.md.

The packages are those that pip takes for the extras `engine` and `operator`, as they are installed here; what they
say of their licence is their own metadata.
"""

import re
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
LISTED = ROOT / "docs" / "licenses.md"
IMAGES = ("engine", "operator")
# Of those that say it in words, what the words mean (SPDX), by what begins or is the whole of them.
_WORDS = (
    ("Apache", "Apache-2.0"),
    ("MIT", "MIT"),
    ("ISC", "ISC"),
    ("BSD 2-Clause", "BSD-2-Clause"),
    ("BSD", "BSD"),
    ("Mozilla Public License 2.0", "MPL-2.0"),
    ("Python Software Foundation", "PSF-2.0"),
)
_HEAD = """# Licences of what the images contain

Written by `make licenses` from the packages' own metadata; a test fails while a package of an image is not in it.
The engine's image for GPUs has NVIDIA's libraries beside these, which torch's and NIXL's CUDA builds bring, under
NVIDIA's own terms. Base images (`FROM`) are not listed: `docker buildx build --sbom=true --provenance=mode=max`
attaches what is in them, and how the image was made, to the image itself.

| package | licence | image |
| --- | --- | --- |
"""


def closure(extra: str) -> set[str]:
    """The names of all packages that an extra of this distribution takes."""
    found: set[str] = set()
    todo = [Requirement(f"kvasir[{extra}]")]
    while todo:
        wanted = todo.pop()
        for each in distribution(wanted.name).requires or []:
            needed = Requirement(each)
            marked = needed.marker is None or any(
                needed.marker.evaluate({"extra": chosen}) for chosen in (*wanted.extras, "")
            )
            name = _canonical(needed.name)
            if marked and name not in found and _installed(name):
                found.add(name)
                todo.append(needed)
    return found


def _installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False  # of another platform, or of CUDA builds
    return True


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def licence(found: Distribution) -> str:
    """As an SPDX expression; empty where the package does not say it."""
    said = found.metadata
    if expression := said.get("License-Expression"):
        return str(expression)
    for text in _texts(found):
        if re.fullmatch(r"[A-Za-z]+-[\w.-]+( (AND|OR) [\w.-]+)*", text):
            return text
        for word, meaning in _WORDS:
            if text.startswith(word):
                return meaning
    return ""


def _texts(found: Distribution) -> Iterator[str]:
    yield (found.metadata.get("License") or "").partition("\n")[0].strip()
    for each in found.metadata.get_all("Classifier") or []:
        if each.startswith("License :: "):
            yield each.rpartition(" :: ")[2]


def rows() -> dict[str, tuple[str, str]]:
    """Of each package its licence and the images that have it."""
    images = {name: closure(name) for name in IMAGES}
    return {
        name: (licence(distribution(name)), ", ".join(image for image in IMAGES if name in images[image]))
        for name in sorted(set().union(*images.values()))
    }


def page() -> str:
    """The page."""
    return _HEAD + "".join(f"| {name} | {said} | {where} |\n" for name, (said, where) in rows().items())


if __name__ == "__main__":
    unsaid = [name for name, (said, _) in rows().items() if not said]
    if unsaid:
        sys.exit(f"no licence is known of {', '.join(unsaid)}")
    LISTED.write_text(page())
