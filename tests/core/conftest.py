"""Lets the tests here import `toy` and `simulation`, and what that takes from the connector's tests."""

import sys
from pathlib import Path

for folder in (Path(__file__).parent, Path(__file__).parents[1] / "connector"):
    sys.path.insert(0, str(folder))
