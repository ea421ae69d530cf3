"""Two halves of the suite beside each other: `pytest -n 2 --dist loadgroup --no-loadscope-reorder`.

Tests that use the shared fleet of vLLM replicas are one group, and the other tests of a module are one: a group runs in
one process, so that what its tests share is started once. Groups that start fleets come first, short ones fill the end.
"""

from pathlib import Path

import pytest

SHARED = "fleet"


def group(item: pytest.Item) -> str:
    """The name of its group."""
    return SHARED if SHARED in getattr(item, "fixturenames", ()) else Path(item.path).stem


def rank(item: pytest.Item) -> int:
    """Groups of a lower rank begin first."""
    if group(item) == SHARED:
        return 0
    return 1 if item.get_closest_marker("fleet") else 2


def is_parallel(config: pytest.Config) -> bool:
    """Whether this process runs one half."""
    return hasattr(config, "workerinput") and config.getoption("dist") == "loadgroup"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if is_parallel(config):
        for item in items:
            item.add_marker(pytest.mark.xdist_group(group(item)))
