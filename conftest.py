"""Order of the tests: the fast ones first, then those with real workers, then the real control plane."""

import pytest

STAGES = ("dataplane", "e2e", "soak")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Stable, so that within a stage the files stay in order."""

    def stage(item: pytest.Item) -> int:
        return max((place for place, name in enumerate(STAGES, 1) if item.get_closest_marker(name)), default=0)

    items.sort(key=stage)
