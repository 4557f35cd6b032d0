"""For processes that never compute: transformers imports torch wherever it can, seconds and hundreds of MB."""

import os
import sys


def without_torch() -> None:
    """Have imports of torch fail from now on, unless it was imported already."""
    if "torch" not in sys.modules:
        sys.modules["torch"] = None  # type: ignore[assignment]
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
