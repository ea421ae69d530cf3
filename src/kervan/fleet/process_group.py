"""Ends an engine with all its workers, and lets Python put away what they shared."""

import contextlib
import os
import signal

import psutil

_TRACKER = "from multiprocessing.resource_tracker import main"


def end_group(leader_pid: int) -> None:
    """SIGKILL for every process of the group that `leader_pid` leads, or led: its own number must not be free yet.

    Python's resource tracker is spared. vLLM's workers talk over shared memory, up to a quarter of a GB for each
    queue, which outlives those who are killed: the tracker sees that all are gone, removes it, and ends by itself.
    """
    own = os.getpid()
    signalled: set[int] = set()
    while fresh := _members(leader_pid) - signalled - {own}:  # again: one may have forked meanwhile
        for pid in fresh:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        signalled |= fresh
    if os.getpgrp() == leader_pid:
        os.kill(own, signal.SIGKILL)


def _members(leader_pid: int) -> set[int]:
    """All of the group but a resource tracker."""
    members = set()
    for pid in psutil.pids():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError, PermissionError):
            if os.getpgid(pid) == leader_pid and not _is_tracker(pid):
                members.add(pid)
    return members


def _is_tracker(pid: int) -> bool:
    with contextlib.suppress(psutil.ZombieProcess, psutil.AccessDenied):
        return any(_TRACKER in word for word in psutil.Process(pid).cmdline())
    return False
