"""Order of the tests: the fast ones first, then those with real workers, then the real control plane.

Tests marked `cuda` are skipped where there is no GPU, and the summary's last line says how many.
"""

import pytest

STAGES = ("dataplane", "e2e", "soak")
CUDA = "needs an NVIDIA GPU"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Stable, so that within a stage the files stay in order."""

    def stage(item: pytest.Item) -> int:
        return max((place for place, name in enumerate(STAGES, 1) if item.get_closest_marker(name)), default=0)

    items.sort(key=stage)
    wanting = [item for item in items if item.get_closest_marker("cuda")]
    if wanting and not _has_gpu():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason=CUDA))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A line with the number of tests that no GPU was there for."""
    skipped = [each for each in terminalreporter.stats.get("skipped", []) if CUDA in str(each.longrepr)]
    if skipped:
        terminalreporter.write_sep("=", f"{len(skipped)} tests were SKIPPED: each {CUDA}", yellow=True)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
