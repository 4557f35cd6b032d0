"""Lets the tests here import `fake_worker`, and `api_support` of the bind_endpoint end's tests."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "api")]
