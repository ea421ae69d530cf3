"""Exhaustive tests and sweeps: `make exhaustive` runs them whole, `make test` a sample of each sweep, or none.

`@pytest.mark.exhaustive` leaves a test to `make exhaustive`. `@pytest.mark.sweep(n)` on a parametrized test takes `n` of
its cases in `make test`, others each day. `positions(count)` does so for a sweep within a test. The seed is the day's, or
KERVAN_SAMPLE_SEED; a run prints it.
"""

import datetime
import os
import random
from collections import defaultdict
from collections.abc import Sequence
from typing import TypeVar

import pytest

SEED = int(os.environ.get("KERVAN_SAMPLE_SEED") or datetime.datetime.now(datetime.UTC).strftime("%Y%m%d"))
_is_exhaustive = False
T = TypeVar("T")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="sweeps whole, and only what `make test` leaves out")


def pytest_configure(config: pytest.Config) -> None:
    global _is_exhaustive  # noqa: PLW0603 - one run of pytest is one or the other
    config.addinivalue_line("markers", "exhaustive: runs in `make exhaustive` only")
    config.addinivalue_line("markers", "sweep(n): `make test` takes n of the cases, others each day")
    _is_exhaustive = config.getoption("--exhaustive")


def pytest_report_header() -> str:
    if _is_exhaustive:
        return "exhaustive: sweeps are whole"
    return f"sweeps are sampled; KERVAN_SAMPLE_SEED={SEED} takes the same cases again"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if len({item.nodeid.split("[")[0] for item in items}) == 1 and any("::" in word for word in config.args):
        return  # named by hand
    sweeps: defaultdict[str, list[pytest.Item]] = defaultdict(list)
    kept = []
    for item in items:
        is_whole, sweep = item.get_closest_marker("exhaustive"), item.get_closest_marker("sweep")
        if _is_exhaustive == bool(is_whole or sweep):
            kept.append(item)
        elif sweep and not is_whole:
            sweeps[item.nodeid.split("[")[0]].append(item)
    for name, cases in sweeps.items():
        sweep = cases[0].get_closest_marker("sweep")
        assert sweep is not None
        kept += sample(sorted(cases, key=lambda item: item.nodeid), sweep.args[0], name)
    chosen = set(kept)
    left_out = [item for item in items if item not in chosen]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item in chosen]


def sample(cases: Sequence[T], count: int, name: str) -> list[T]:
    """`count` of them, or all; the same for a name and a day."""
    if len(cases) <= count:
        return list(cases)
    return random.Random(f"{SEED} {name}").sample(cases, count)


def positions(count: int, name: str, most: int = 6) -> list[int]:
    """Of 0 to `count` - 1: all of them in `make exhaustive`, else the first, the last and some between."""
    if _is_exhaustive or count <= most:
        return list(range(count))
    return sorted({0, count - 1, *sample(range(1, count - 1), most - 2, name)})
