"""A group of processes is ended with what it shares."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.live import eventually, is_alive

from kervan.fleet.process_group import end_group

GROUP = """
import multiprocessing, os, time
from multiprocessing.shared_memory import SharedMemory
def work(name, told):
    SharedMemory(name)
    told.send(os.getpid())
    time.sleep(600)
if __name__ == "__main__":
    shared = SharedMemory(create=True, size=4096)
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    worker = context.Process(target=work, args=(shared.name, theirs))
    worker.start()
    print(shared.name, ours.recv(), flush=True)
    {then}
"""


@pytest.fixture(params=["alive", "dead", "itself"])
def how(request: pytest.FixtureRequest) -> str:
    """The leader when the group is ended: it lives, was killed, or is the one who ends it."""
    return str(request.param)


@pytest.fixture
def leader(tmp_path: Path, how: str) -> Iterator["subprocess.Popen[str]"]:
    then = "end_group(os.getpgrp())" if how == "itself" else "time.sleep(600)"
    program = tmp_path / "leader.py"
    program.write_text("from kervan.fleet.process_group import end_group\n" + GROUP.format(then=then))
    with subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True, start_new_session=True) as own:
        yield own
        own.kill()


def test_workers_end_and_their_shared_memory_goes(leader: "subprocess.Popen[str]", how: str) -> None:
    assert leader.stdout is not None
    name, worker = leader.stdout.readline().split()
    segment = Path("/dev/shm", name)
    if how != "itself":
        assert segment.exists()
        assert is_alive(int(worker))
        if how == "dead":
            leader.kill()
        end_group(leader.pid)
    assert leader.wait(10) == -signal.SIGKILL
    eventually(lambda: not is_alive(int(worker)), "the worker has ended", 10, every_s=0.01)
    eventually(lambda: not segment.exists(), "its shared memory is gone", 10, every_s=0.01)

    def is_empty() -> bool:
        try:
            os.killpg(leader.pid, 0)
        except ProcessLookupError:
            return True
        return False

    eventually(is_empty, "nobody is left, nor the tracker", 10, every_s=0.01)
