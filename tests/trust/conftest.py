"""Lets the tests here import the toy model, the stand and the certificates."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
for folder in (HERE, HERE.parent / "core", HERE.parent / "wire"):
    sys.path.insert(0, str(folder))
