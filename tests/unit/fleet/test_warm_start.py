"""Processes forked from a server: what they inherit, how they end, and what becomes of the server."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness.live import eventually, is_alive
from harness.places import TESTS

from kervan.fleet import warm_start
from kervan.fleet.warm_start import ForkedProcess, WarmStartError

MODULE = "harness.forked"


@dataclass
class Child:
    process: ForkedProcess
    control: socket.socket
    log: Path
    server: int

    def says(self, expression: str) -> str:
        self.control.sendall(expression.encode() + b"\n")
        return self.control.makefile("r").readline().strip()


Fork = Callable[..., Child]


@pytest.fixture
def fork(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fork]:
    """Forks from servers of this test's own; all of them are gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="kt-") as directory:  # a socket's path is short
        monkeypatch.setattr(tempfile, "tempdir", directory)
        children: list[Child] = []

        def fork(*, hints: tuple[str, ...] = (), owner_pid: int | None = None, **env: str) -> Child:
            log = tmp_path / f"{len(children)}.log"
            ours, theirs = socket.socketpair()
            whole = {**os.environ, "PYTHONPATH": str(TESTS), **env}
            with theirs, log.open("ab") as file:
                process = warm_start.fork(
                    MODULE,
                    "some.program",
                    env=whole,
                    control=theirs,
                    log_fd=file.fileno(),
                    hints=hints,
                    owner_pid=owner_pid,
                )
            children.append(Child(process, ours, log, server=psutil.Process(process.pid).ppid()))
            return children[-1]

        yield fork
        for child in children:
            child.control.close()
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.server, signal.SIGKILL)


def test_children_share_a_server_and_what_it_has_prepared(fork: Fork) -> None:
    first, second = fork(hints=("a",)), fork(hints=("b",))
    assert first.server == second.server
    assert (first.says("prepared"), second.says("prepared")) == ("['a']", "['a', 'b']")
    assert first.says("program") == "some.program"
    assert float(first.says("asked_s")) <= time.time()


def test_what_may_wait_is_prepared_when_nobody_waits(fork: Fork) -> None:
    assert fork(hints=("later",)).says("prepared") == "['later']"
    eventually(lambda: "'later'" in fork().says("prepared[1:]"), "it is prepared", 20)


def test_a_child_has_its_own_environment_group_directory_and_log(fork: Fork) -> None:
    one, other = fork(CUDA_VISIBLE_DEVICES="1", RAY_X="one"), fork(CUDA_VISIBLE_DEVICES="0")
    assert one.server == other.server
    assert (one.says("os.environ['CUDA_VISIBLE_DEVICES']"), other.says("'RAY_X' in os.environ")) == ("1", "False")
    assert int(one.says("os.getpgrp()")) == int(one.says("os.getsid(0)")) == one.process.pid
    assert one.says("os.getcwd()") == str(Path.cwd())
    one.says("os.system('echo out; echo err >&2')")
    assert one.log.read_text() == "out\nerr\n"
    # Input, output, errors, its control line, and the listing: nothing of the server or of other children.
    assert int(one.says("len(os.listdir('/proc/self/fd'))")) == 5


def test_a_child_leads_its_group_when_its_number_is_known(fork: Fork) -> None:
    for _ in range(20):
        child = fork()
        assert os.getpgid(child.process.pid) == child.process.pid


def test_what_is_inherited_makes_another_server(fork: Fork) -> None:
    assert fork(OMP_NUM_THREADS="1").server != fork(OMP_NUM_THREADS="2").server


def test_what_only_watchers_of_notices_read_makes_none(fork: Fork) -> None:
    assert fork(KERVAN_NOTICES_WATCH="aws").server == fork(KERVAN_NOTICES_WATCH="gcp").server


def test_an_exit_status_and_a_signal_are_told(fork: Fork) -> None:
    child = fork()
    child.control.sendall(b"os._exit(7)\n")
    assert child.process.wait() == 7
    child = fork()
    os.kill(child.process.pid, signal.SIGTERM)
    assert child.process.wait() == -signal.SIGTERM


def test_a_number_stays_taken_until_the_end_is_known(fork: Fork) -> None:
    child = fork()
    os.kill(child.process.pid, signal.SIGKILL)
    eventually(lambda: psutil.Process(child.process.pid).status() == psutil.STATUS_ZOMBIE, "it is dead", 10)
    fork().says("1")  # the server has been at work since
    assert psutil.pid_exists(child.process.pid)
    assert child.process.wait() == -signal.SIGKILL
    eventually(lambda: not psutil.pid_exists(child.process.pid), "it is reaped", 10)


def test_a_child_outlives_its_server_and_the_next_ones_get_another(fork: Fork) -> None:
    child = fork()
    server = child.server
    os.kill(server, signal.SIGKILL)
    eventually(lambda: not is_alive(server), "the server is gone", 10)
    assert child.says("1 + 1") == "2"
    assert fork().server != server
    child.control.sendall(b"os._exit(0)\n")
    assert child.process.wait() is None


def test_a_server_that_cannot_fork_says_why_and_is_not_asked_again(fork: Fork) -> None:
    with pytest.raises(WarmStartError, match=r"2 threads run after the imports \(.*\), and a fork has one"):
        fork(hints=("thread",))
    logs = [path.stat().st_mtime_ns for path in Path(tempfile.gettempdir()).glob("*/*.log")]
    with pytest.raises(WarmStartError, match="2 threads run"):
        fork()
    assert [path.stat().st_mtime_ns for path in Path(tempfile.gettempdir()).glob("*/*.log")] == logs


def test_a_server_whose_imports_fail_is_told(fork: Fork) -> None:
    with pytest.raises(WarmStartError, match=r"the fork server ended; see \S+\.log"):
        fork(LINGER_S="not a number")


def test_others_files_are_not_trusted(fork: Fork) -> None:
    directory = Path(tempfile.gettempdir()) / f"kervan-warm-{os.getuid()}"
    directory.mkdir(mode=0o755)
    with pytest.raises(WarmStartError, match="is not this user's alone: chmod 700"):
        fork()


def test_it_ends_with_the_last_process_that_it_is_for(fork: Fork) -> None:
    owner = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    child = fork(owner_pid=owner.pid)
    server = child.server
    os.kill(child.process.pid, signal.SIGKILL)
    child.process.wait()
    assert is_alive(server)
    owner.communicate(b"\n")
    eventually(lambda: not is_alive(server), "the server is gone with its owner", 10)
    assert fork().server != server


def test_it_ends_with_that_process_during_its_imports_too(fork: Fork, tmp_path: Path) -> None:
    owner, slow = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE), tmp_path / "slow"
    with ThreadPoolExecutor() as pool:
        forking = pool.submit(fork, owner_pid=owner.pid, SLOW=str(slow))
        server = int(eventually(lambda: slow.exists() and slow.read_text(), "it imports", 30))
        assert is_alive(server)
        owner.communicate(b"\n")
        eventually(lambda: not is_alive(server), "the server is gone with its owner", 10)
        with pytest.raises(WarmStartError, match="the fork server ended"):
            forking.result(30)


def test_it_ends_when_nobody_needs_it_for_a_while(fork: Fork) -> None:
    child = fork(LINGER_S="0.5")
    server = child.server
    child.control.close()
    child.process.wait()
    eventually(lambda: not is_alive(server), "the server is gone", 20)
    assert not list(Path(tempfile.gettempdir()).glob("*/*.sock"))


def test_a_client_that_only_looks_changes_nothing(fork: Fork) -> None:
    child = fork()
    path = next(Path(tempfile.gettempdir()).glob("*/*.sock"))
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as looker:
        looker.connect(str(path))
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as garbler, tempfile.TemporaryFile() as file:
        file.write(b"no request")
        file.flush()
        garbler.connect(str(path))
        socket.send_fds(garbler, [b"?"], [file.fileno()] * 3)
        assert b"the request cannot be read" in garbler.recv(1000)
    assert fork().server == child.server


def test_concurrent_forks(fork: Fork) -> None:
    children: list[Any] = [fork() for _ in range(8)]
    assert len({child.server for child in children}) == 1
    for child in children:
        child.control.close()
    assert [child.process.wait() for child in children] == [0] * 8
