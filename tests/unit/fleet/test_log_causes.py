"""Logs are shortened from vLLM 0.32's own; see also tests/unit/fleet/vllm/test_failures.py."""

from pathlib import Path

import pytest

from kervan.fleet import log_causes

HEAD = "(Worker_TP1 pid=18) ERROR 11-29 19:30:03 [multiproc_executor.py:953] "
WORKER = (
    "WorkerProc failed to start.",
    "Traceback (most recent call last):",
    '  File "/vllm/v1/executor/multiproc_executor.py", line 915, in worker_main',
    "    worker = WorkerProc(*args, **kwargs)",
    "             ^^^^^^^^^^^^^^^^^^^^^^^^^^^",
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.96 GiB.",
    "GPU 0 has a total capacity of 79.11 GiB.",
)
ENGINE = """\
2026-11-29 19:30:08,409 ERROR kervan.fleet.vllm.replica: engine start failed
Traceback (most recent call last):
  File "/vllm/v1/executor/multiproc_executor.py", line 815, in wait_for_ready
    raise e from None
Exception: WorkerProc initialization failed due to an exception in a background process. See stack trace for root cause.
/multiprocessing/resource_tracker.py:254: UserWarning: resource_tracker: There appear to be 1 leaked semaphore objects
  warnings.warn('resource_tracker: There appear to be %d '
"""


def test_a_workers_error_is_found_although_another_ones_lines_lie_between() -> None:
    other = "(Worker_TP0 pid=17) INFO 11-29 19:30:03 [parallel_state.py:1] rank 0 in world size 2\n"
    log = other.join(f"{HEAD}{line}\n" for line in WORKER) + ENGINE
    assert log_causes.causes(log) == [
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 1.96 GiB. GPU 0 has a total capacity of 79.11 GiB."
    ]


@pytest.mark.parametrize(
    ("log", "found"),
    [
        pytest.param("", [], id="empty"),
        pytest.param("INFO: fine\nValueError: only mentioned\n", [], id="no traceback"),
        pytest.param(ENGINE, [], id="a consequence"),
        pytest.param(
            "Traceback (most recent call last):\n  x\nOSError: gated repo.\nAsk at https://a/b\n\nmore\n",
            ["OSError: gated repo. Ask at https://a/b"],
            id="two lines",
        ),
        pytest.param(
            "Traceback (most recent call last):\n  x\nKeyError: 'a'\n\n"
            "The above exception was the direct cause of the following exception:\n\n"
            "Traceback (most recent call last):\n  x\nValueError: b\n",
            ["KeyError: 'a'", "ValueError: b"],
            id="chained",
        ),
        pytest.param(
            "Exception ignored in: <function X.__del__>\nTraceback (most recent call last):\n  x\nAttributeError: a\n",
            [],
            id="ignored by Python",
        ),
        pytest.param(
            "python: error while loading shared libraries: libcudart.so.13: cannot open shared object file\n",
            ["error while loading shared libraries: libcudart.so.13: cannot open shared object file"],
            id="the loader",
        ),
        pytest.param("Traceback (most recent call last):\n  x\nSystemExit: 1\n", [], id="an exit"),
        pytest.param("Traceback (most recent call last):\n  x\nMemoryError\n", ["MemoryError:"], id="no text"),
        pytest.param("Traceback (most recent call last):\n  x\n", [], id="cut off"),
    ],
)
def test_causes_of_a_log(log: str, found: list[str]) -> None:
    assert log_causes.causes(log) == found


def test_only_the_end_of_a_log_is_read(tmp_path: Path) -> None:
    path = tmp_path / "log"
    assert log_causes.tail(path) == ""
    path.write_bytes(b"a" * log_causes.TAIL_BYTES + b"\xff end")
    assert log_causes.tail(path).endswith(" end")
    assert len(log_causes.tail(path)) == log_causes.TAIL_BYTES
