"""Two halves of the suite beside each other: `pytest -n 2 --dist loadscope --no-loadscope-reorder`.

Tests that use the same shared fleet are one group, and the other tests of a module are one: a group runs in one process,
so that what its tests share is started once. Long groups come first, short ones fill the end. A shared fleet ends with
its group, as it would cost a tenth of a core for the rest of the run.
"""

import contextlib
import functools
import json
import os
import tempfile
from pathlib import Path
from typing import Any, TypeVar

import pytest
from xdist.scheduler import LoadScopeScheduling

# Fixtures of the whole session (harness/shared_*.py); what uses two of them is of the first's group.
SHARED = ("fleet", "twins", "nodes", "warm_place", "trio")
# Modules of a minute or more: were one of them last, a core would be idle meanwhile.
LONG = ("test_scaling", "test_clusters", "test_lifecycle", "test_ray_auth", "test_resume", "test_memory_torch")
PLACE = "KERVAN_TEST_GROUPS"  # the file in which the first process tells the group of each test


ENDS = pytest.StashKey[contextlib.ExitStack]()
T = TypeVar("T")


def until_group_ends(config: pytest.Config, context: contextlib.AbstractContextManager[T]) -> T:
    """Enter a context; it is left after the last test of the group that runs now. For fixtures of the session."""
    return config.stash.setdefault(ENDS, contextlib.ExitStack()).enter_context(context)


def group(item: pytest.Item) -> str:
    """The name of its group."""
    wanted = getattr(item, "fixturenames", ())
    return next((fixture for fixture in SHARED if fixture in wanted), Path(item.path).stem)


def rank(item: pytest.Item) -> int:
    """Groups of a lower rank begin first."""
    order = (*SHARED, *LONG)
    if (name := group(item)) in order:
        return order.index(name)
    return len(order) + (0 if item.get_closest_marker("fleet") else 1)


def is_parallel(config: pytest.Config) -> bool:
    """Whether this process runs one half."""
    return hasattr(config, "workerinput") and PLACE in os.environ


class GroupScheduling(LoadScopeScheduling):  # type: ignore[misc]
    """xdist's own groups are marked by suffixes of names, which pytest 9.2 does not take (xdist 3.8.0)."""

    @functools.cached_property
    def _groups(self) -> dict[str, str]:
        groups: dict[str, str] = json.loads(Path(os.environ[PLACE]).read_text())
        return groups

    def _split_scope(self, nodeid: str) -> str:
        return self._groups[nodeid]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> GroupScheduling | None:
    return GroupScheduling(config, log) if PLACE in os.environ else None


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        return
    os.environ.pop(PLACE, None)
    if config.getoption("dist", "no") == "loadscope":
        file, os.environ[PLACE] = tempfile.mkstemp(prefix="kt-groups-")
        os.close(file)


@pytest.hookimpl(tryfirst=True)  # before xdist tells that there are tests to run
def pytest_collection_finish(session: pytest.Session) -> None:
    if is_parallel(session.config) and session.config.workerinput["workerid"] == "gw0":  # type: ignore[attr-defined]
        told = Path(os.environ[PLACE])
        told.with_suffix(".part").write_text(json.dumps({item.nodeid: group(item) for item in session.items}))
        told.with_suffix(".part").rename(told)


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput") and (place := os.environ.pop(PLACE, None)):
        Path(place).unlink(missing_ok=True)


@pytest.hookimpl(trylast=True)  # after the fixtures that use a shared fleet
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if nextitem is None or (is_parallel(item.config) and group(nextitem) != group(item)):
        item.config.stash.setdefault(ENDS, contextlib.ExitStack()).close()
