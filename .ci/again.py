"""After a `make test` that failed: is it the change, or a test that only fails beside 5,000 others?

At most three tests may have failed, of a run that got to its end. Lint has to pass now, and each of the tests three
times out of three, alone. They are printed as flaky then, and the exit status is 0; else it is 1. A flaky test is a
fault of its own, of the test or of what it tests, and the first thing to be mended.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

MOST = 3
TIMES = 3
CACHE = Path(".pytest_cache/v")
TESTS_FAILED = 1  # pytest's exit status where all ran; others say that some did not


def _cached(name: str, otherwise: Any) -> Any:
    file = CACHE / name
    return json.loads(file.read_text()) if file.exists() else otherwise


def main() -> int:
    failed = sorted(_cached("cache/lastfailed", {}))
    if _cached("kvasir/exitstatus", None) != TESTS_FAILED or not 0 < len(failed) <= MOST:
        print("not run again: the tests did not get to their end, or too many failed", file=sys.stderr)
        return 1
    if subprocess.call(["make", "lint"]):
        return 1
    pytest = [sys.executable, "-m", "pytest", "--tb=long", "-p", "no:cacheprovider"]
    for number in range(1, TIMES + 1):
        print(f"again alone, {number} of {TIMES}: {' '.join(failed)}", flush=True)
        if subprocess.call([*pytest, *failed]):
            return 1
    for test in failed:
        print(f"FLAKY: {test} failed beside the other tests and passed {TIMES} times alone")
    return 0


if __name__ == "__main__":
    sys.exit(main())
