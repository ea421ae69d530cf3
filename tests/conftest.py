"""For all tests: cheap ones first and destructive ones last; at the end nothing that they started is alive."""

import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness import commands, groups, warm_owner

from kervan import autogroups

pytest_plugins = [
    *("harness.groups", "harness.sweeps", "harness.toy_fleet"),
    *("harness.shared_fleet", "harness.shared_twins", "harness.shared_nodes", "harness.warm_place"),
]

MARK = "KERVAN_TEST_SESSION"
LEAVE_S = 20.0


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "destructive: kills parts of the shared fleet; runs last")
    # Short, because Ray puts Unix sockets under it (107 characters at most), and ours, so that strays are found.
    config.stash[SCRATCH] = Path(tempfile.mkdtemp(prefix="kt-", dir="/tmp"))
    os.environ[MARK] = uuid.uuid4().hex
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(TellsFailures(config))


class TellsFailures:
    """Names each test that fails at once: a run takes minutes, and may be ended before its summary."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    @pytest.hookimpl(trylast=True)  # after pytest's own letter
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        reporter = self._config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and reporter is not None:
            crash = getattr(report.longrepr, "reprcrash", None)
            why = "" if crash is None else f": {crash.message.splitlines()[0][:200]}"
            reporter.write_line(f"\nfailed: {report.nodeid} ({report.when}, {report.duration:.1f} s){why}", red=True)


def pytest_report_header() -> str | None:
    return autogroups.warning()


SCRATCH = pytest.StashKey[Path]()
LEFT = pytest.StashKey[list[str]]()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash.setdefault(LEFT, []).extend(getattr(node, "workeroutput", {}).get("left", []))


@pytest.hookimpl(trylast=True)  # after pytest-randomly has shuffled
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def cost(item: pytest.Item) -> tuple[int, bool]:
        is_destructive = item.get_closest_marker("destructive") is not None
        if groups.is_parallel(config):
            return groups.rank(item), is_destructive
        return item.get_closest_marker("fleet") is not None, is_destructive

    for item in items:
        if item.get_closest_marker("fleet"):
            # The first such test pays for the model and the fleet, and a killed replica takes a minute to come back.
            item.add_marker(pytest.mark.timeout(1200))
    items.sort(key=cost)


@pytest.fixture(scope="session")
def scratch(request: pytest.FixtureRequest) -> Path:
    """A short directory of this session; started processes work in it."""
    return request.config.stash[SCRATCH]


@pytest.fixture(scope="session")
def strays(scratch: Path) -> Callable[..., list[str]]:
    """Asks for the processes that this session started and that are still alive; but not for those of Rays whose
    directories are given, which start and end workers when they like.
    """
    return lambda *beside: _strays(scratch, beside)


def _strays(scratch: Path, beside: Sequence[Path] = ()) -> list[str]:
    """Processes that this session started, directly or not, and that are still alive.

    They have the mark in their environment. Ray's workers overwrite theirs with a title; they work in `scratch`.
    """
    mark, found = f"{MARK}={os.environ[MARK]}".encode(), []
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        if process.pid in (os.getpid(), commands.server_pid()) or process.info["status"] == psutil.STATUS_ZOMBIE:
            continue
        try:
            is_ours = mark in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
            is_ours = is_ours or Path(process.cwd()).is_relative_to(scratch)
        except (OSError, psutil.Error):
            continue
        command = " ".join(process.info["cmdline"] or ())
        is_ours = is_ours and any(word in command.lower() for word in ("ray", "vllm", "kervan"))
        if is_ours and not any(_is_of_ray(process.pid, directory) for directory in beside):
            found.append(f"{process.pid}: {command[:150]}")
    return found


def _is_of_ray(pid: int, directory: Path) -> bool:
    """Whether it writes its log there, as all of Ray's processes do."""
    try:
        return any(file.readlink().is_relative_to(directory) for file in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    commands.end()
    warm_owner.end()
    scratch = session.config.stash[SCRATCH]
    deadline_s = time.monotonic() + LEAVE_S
    while (left := _strays(scratch)) and time.monotonic() < deadline_s:
        time.sleep(0.2)
    files = sorted(path.name for path in scratch.glob("kervan-ray-*"))
    if left or files:
        told = session.config.stash.setdefault(LEFT, [])
        told += [*left, *(f"{scratch}/{name}" for name in files)]
    if told := session.config.stash.get(LEFT, []):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        if hasattr(session.config, "workeroutput"):  # the process that started this one tells it
            session.config.workeroutput["left"] = told
        elif (reporter := session.config.pluginmanager.get_plugin("terminalreporter")) is not None:
            reporter.write_line("\nleft behind by the tests:\n" + "\n".join(told), red=True)
    if session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED) or not any(scratch.iterdir()):
        shutil.rmtree(scratch, ignore_errors=True)
    else:
        print(f"\nlogs of the tests' fleets: {scratch}")
