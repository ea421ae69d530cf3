"""Which rank of a group the others wait for, read off the stacks of their processes.

A collective ends on no rank before all have come to it. So in a hang some ranks stand inside one, and one stands
elsewhere, or is stopped or gone; in a long step nobody waits. Each process has `faulthandler` write the Python frames
of its threads to a file when it is sent SIGUSR2, which it does also while it is inside a call of C++ or CUDA.
"""

import os
import re
import signal
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["in collective", "on GPU", "idle", "elsewhere", "stopped", "gone", "unknown"]
Kind = Literal["collective", "step", "unknown"]

THREAD = re.compile(r"^(?:Current thread|Thread) 0x[0-9a-f]+.*\(most recent call first\):$", re.M)
FRAME = re.compile(r'^  File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<function>.+)$', re.M)
# Frames that only hand a call on, of torch or of Python's own library: the next one outwards tells where a rank is.
HANDS_ON = re.compile(
    r"/torch/(_ops|_library/\w+|_dynamo/\w+|utils/_contextlib|nn/modules/module)\.py$"
    r"|/lib/python3\.\d+/(?!site-packages/|dist-packages/)[^/]+\.py$"
)
IDLE = re.compile(r"/shm_broadcast\.py$")  # vLLM's workers wait there for the next step
COLLECTIVE = re.compile(r"/torch/distributed/|/vllm/distributed/|/torch/_C/_distributed")
ON_GPU = re.compile(r"/torch/cuda/")
POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Activity:
    """What one rank does. `where`: the function, its file and line; empty if that is not known."""

    rank: int
    pid: int
    state: State
    where: str = ""

    def __str__(self) -> str:
        place = {"stopped": "is stopped (SIGSTOP)", "gone": "is gone", "unknown": "does not answer"}.get(self.state)
        return f"rank {self.rank} (pid {self.pid}) {place or 'is in ' + (self.where or self.state)}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """`kind`: a hang in a collective, or a step that is still computed. `ranks`: those that the others wait for."""

    kind: Kind
    reason: str
    ranks: tuple[int, ...] = ()


def activity(rank: int, pid: int, dump: str) -> Activity:
    """What a rank does by the newest dump of its stacks: its main thread is the last of one."""
    threads = THREAD.split(dump)
    frames = [match.groupdict() for match in FRAME.finditer(threads[-1])] if len(threads) > 1 else []
    if not frames:
        return Activity(rank, pid, "unknown")
    shown = [frame for frame in frames if not HANDS_ON.search(frame["file"])] or frames
    inner = shown[0]
    where = f"{inner['function']} ({Path(inner['file']).name}:{inner['line']})"
    if IDLE.search(inner["file"]):
        return Activity(rank, pid, "idle", where)
    if COLLECTIVE.search(inner["file"]):
        return Activity(rank, pid, "in collective", where)
    if ON_GPU.search(inner["file"]):
        return Activity(rank, pid, "on GPU", where)
    return Activity(rank, pid, "elsewhere", where)


def judge(ranks: Sequence[Activity]) -> Verdict:
    """Whether a group that makes no step hangs in a collective, and which of its ranks the others wait for."""
    away = [r for r in ranks if r.state in ("elsewhere", "stopped", "gone")]
    # A rank that waits for its GPU may compute, or wait for a rank that has not launched its part.
    waits = ("in collective", "on GPU") if away else ("in collective",)
    waiting = [r for r in ranks if r.state in waits]
    lost = [r for r in away if r.state in ("stopped", "gone")]
    idle = [r for r in ranks if r.state == "idle"]
    late = away or (idle if waiting else [])
    if (waiting and late) or (lost and len(lost) < len(ranks)):
        named = late if waiting else lost
        others = [r for r in ranks if r not in named]
        told = f"; {_numbers(others)} {'wait' if len(others) > 1 else 'waits'} for it" if len(named) == 1 else ""
        place = f" in {waiting[0].where}" if waiting and told else ""
        reason = "a collective hangs: " + ", ".join(map(str, named)) + told + place
        return Verdict("collective", reason, tuple(r.rank for r in named))
    if waiting and len(waiting) == len(ranks):
        return Verdict(
            "collective", f"a collective hangs: all ranks here are in {waiting[0].where}, so a link or a GPU does"
        )
    if not ranks or all(r.state == "unknown" for r in ranks):
        return Verdict("unknown", "what its ranks do is not known")
    return Verdict("step", "a step is still computed: " + ", ".join(map(str, ranks)))


def _numbers(ranks: Iterable[Activity]) -> str:
    numbers = [str(r.rank) for r in ranks]
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {', '.join(numbers)}"


def look(processes: Iterable[tuple[int, int, Path]], *, wait_s: float) -> list[Activity]:
    """What ranks (number, pid, the file that it dumps to) do now; each is waited for at most `wait_s`."""
    found: list[Activity] = []
    asked = []
    for rank, pid, path in processes:
        state = _process_state(pid)
        if state in ("stopped", "gone"):
            found.append(Activity(rank, pid, state))
        elif not path.exists():  # it has no handler, and the signal would end it
            found.append(Activity(rank, pid, "unknown"))
        else:
            before = path.stat().st_size
            try:
                os.kill(pid, signal.SIGUSR2)
            except ProcessLookupError:
                found.append(Activity(rank, pid, "gone"))
                continue
            asked.append((rank, pid, path, before))
    end_s = time.monotonic() + wait_s
    for rank, pid, path, before in asked:
        found.append(activity(rank, pid, _dump(path, before, end_s)))
    return sorted(found, key=lambda a: a.rank)


def _dump(path: Path, before: int, end_s: float) -> str:
    """What came to a file after `before` bytes; a dump is written in many pieces, so until no more comes."""
    size = before
    while time.monotonic() < end_s:
        time.sleep(POLL_S)
        now = path.stat().st_size
        if now == size > before:
            break
        size = now
    with path.open(errors="replace") as file:
        file.seek(before)
        return file.read()


def _process_state(pid: int) -> State:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "gone"
    return "stopped" if fields[0] in ("T", "t") else "gone" if fields[0] in ("Z", "X") else "unknown"
