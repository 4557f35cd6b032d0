"""For processes that do not compute: transformers imports torch wherever it can, which costs seconds and hundreds
of MB.
"""

import os
import sys


def without_torch() -> None:
    """Make imports of torch fail from now on, unless it is imported already."""
    if "torch" not in sys.modules:
        sys.modules["torch"] = None  # type: ignore[assignment]
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
