"""Which rank the others wait for, by the stacks of their processes."""

import faulthandler
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kervan.fleet.rank_watch import RankWatch, dump_path
from kervan.ranks import stacks
from kervan.ranks.stacks import Activity, State, activity, judge

TORCH = "/env/lib/python3.11/site-packages/torch"
VLLM = "/env/lib/python3.11/site-packages/vllm"


def dump(*frames: tuple[str, int, str]) -> str:
    """As faulthandler writes it: another thread, then the main one, innermost frames first."""
    lines = [f'  File "{file}", line {line} in {function}' for file, line, function in frames]
    other = ["Thread 0x00007f01 (most recent call first):", '  File "/usr/lib/threading.py", line 327 in wait', ""]
    return "\n".join([*other, "Current thread 0x00007f02 (most recent call first):", *lines]) + "\n"


STEP = (f"{VLLM}/v1/worker/cpu_worker.py", 300, "execute_model")


@pytest.mark.parametrize(
    ("frames", "state", "where"),
    [
        ([(f"{TORCH}/distributed/distributed_c10d.py", 2806, "all_reduce"), STEP], "in collective",
         "all_reduce (distributed_c10d.py:2806)"),
        ([(f"{TORCH}/_ops.py", 1209, "__call__"), (f"{VLLM}/distributed/device_communicators/cpu_communicator.py", 60, "all_reduce"),
          STEP], "in collective", "all_reduce (cpu_communicator.py:60)"),
        ([(f"{TORCH}/cuda/streams.py", 231, "synchronize"), STEP], "on GPU", "synchronize (streams.py:231)"),
        ([(f"{VLLM}/distributed/device_communicators/shm_broadcast.py", 500, "acquire_read")], "idle",
         "acquire_read (shm_broadcast.py:500)"),
        ([("/app/plugin.py", 7, "sleep"), (f"{VLLM}/distributed/parallel_state.py", 512, "all_reduce"), STEP],
         "elsewhere", "sleep (plugin.py:7)"),
        ([("/usr/lib/python3.11/threading.py", 327, "wait"), ("/app/plugin.py", 7, "load")], "elsewhere",
         "load (plugin.py:7)"),
        ([("/usr/lib/python3.11/threading.py", 327, "wait")], "elsewhere", "wait (threading.py:327)"),
        ([], "unknown", ""),
    ],
)  # fmt: skip
def test_where_a_rank_is_by_its_innermost_frame(frames: list[tuple[str, int, str]], state: State, where: str) -> None:
    assert activity(1, 7, dump(*frames)) == Activity(1, 7, state, where)


def ranks(*states: State) -> list[Activity]:
    return [Activity(number, 100 + number, state, f"f{number} (x.py:1)") for number, state in enumerate(states)]


@pytest.mark.parametrize(
    ("states", "kind", "named"),
    [
        (("in collective", "elsewhere"), "collective", (1,)),
        (("in collective", "elsewhere", "in collective", "in collective"), "collective", (1,)),
        (("in collective", "stopped"), "collective", (1,)),
        (("gone", "in collective"), "collective", (0,)),
        (("on GPU", "elsewhere"), "collective", (1,)),
        (("on GPU", "stopped"), "collective", (1,)),
        (("in collective", "idle"), "collective", (1,)),
        (("in collective", "in collective"), "collective", ()),
        (("elsewhere", "elsewhere"), "step", ()),
        (("on GPU", "on GPU"), "step", ()),
        (("on GPU", "idle"), "step", ()),  # the usual picture of a long step: one rank hands over the output
        (("unknown", "unknown"), "unknown", ()),
        ((), "unknown", ()),
    ],
)  # fmt: skip
def test_a_hang_is_told_from_a_long_step(states: tuple[State, ...], kind: str, named: tuple[int, ...]) -> None:
    verdict = judge(ranks(*states))
    assert (verdict.kind, verdict.ranks) == (kind, named)


def test_the_reason_names_the_rank_its_process_and_who_waits() -> None:
    reason = judge(ranks("in collective", "stopped", "in collective")).reason
    assert reason == "a collective hangs: rank 1 (pid 101) is stopped (SIGSTOP); ranks 0, 2 wait for it in f0 (x.py:1)"


SLEEPER = """
import faulthandler, signal, sys, time
def broken_all_reduce():
    print("ready", flush=True)
    time.sleep(600)
faulthandler.register(signal.SIGUSR2, file=open(sys.argv[1], "w"), all_threads=True)
broken_all_reduce()
"""


def test_a_process_that_sleeps_is_seen_where_it_sleeps_and_one_that_is_stopped_as_stopped(tmp_path: Path) -> None:
    path = tmp_path / "stack"
    with subprocess.Popen([sys.executable, "-c", SLEEPER, str(path)], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            (seen,) = stacks.look([(3, process.pid, path)], wait_s=20)
            assert (seen.rank, seen.state) == (3, "elsewhere")
            assert seen.where.startswith("broken_all_reduce (<string>:")
            os.kill(process.pid, signal.SIGSTOP)
            os.waitpid(process.pid, os.WUNTRACED)
            assert stacks.look([(3, process.pid, path)], wait_s=20)[0].state == "stopped"
        finally:
            process.kill()
    assert stacks.look([(3, process.pid, path)], wait_s=1)[0].state == "gone"


def test_a_process_without_a_handler_is_not_signalled(tmp_path: Path) -> None:
    assert stacks.look([(0, os.getpid(), tmp_path / "none")], wait_s=1)[0].state == "unknown"


def test_a_watch_is_sure_after_looks_that_agree_and_forgets_when_steps_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kervan.fleet.rank_watch.PERIOD_S", 0.0)
    with subprocess.Popen([sys.executable, "-c", SLEEPER, str(tmp_path / "s")], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        own = dump_path(tmp_path, 0, os.getpid())
        with own.open("w") as file:
            faulthandler.register(signal.SIGUSR2, file=file, all_threads=True)
            try:
                os.kill(process.pid, signal.SIGSTOP)
                os.waitpid(process.pid, os.WUNTRACED)
                dump_path(tmp_path, 1, process.pid).touch()
                watch = RankWatch(tmp_path, {"NCCL_RAS_ADDR": "127.0.0.1:1"})
                assert watch.look(1.0) == ""
                said = watch.look(10.0)
                assert said.startswith(f"a collective hangs: rank 1 (pid {process.pid}) is stopped")
                assert watch.hang == ""
                watch.look(11.0)
                watch.look(12.0)
                assert watch.hang == said
                assert (watch.look(0.1), watch.hang) == ("", "")
            finally:
                faulthandler.unregister(signal.SIGUSR2)
                process.kill()
