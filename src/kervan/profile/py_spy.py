"""Samples the Python stacks of a running process with py-spy, a program of its own that reads its memory."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from kervan.errors import EngineError

RATE_HZ = 100
GRACE_S = 30.0  # beyond the time of sampling: it reads symbols first and writes its file after
_DENIED = ("permission denied", "operation not permitted")


def find() -> str | None:
    """The program: of this environment, else on the PATH; None where it is not installed."""
    own = Path(sys.executable).with_name("py-spy")
    return str(own) if own.exists() else shutil.which("py-spy")


def record(pid: int, for_s: float, *, rate_hz: int = RATE_HZ, with_children: bool = False) -> str:
    """Stacks in py-spy's `raw` format: frames joined by `;`, and the number of samples; idle threads are left out.

    Blocks for `for_s` and a little more. Raises: EngineError that says why there are none, and what helps.
    """
    program = find()
    if program is None:
        raise EngineError("py-spy is not installed; pip install 'kervan[profile]'")
    with tempfile.TemporaryDirectory(prefix="kervan-") as directory:
        out = Path(directory) / "stacks"
        command = [program, "record", "--pid", str(pid), "--duration", str(max(1, round(for_s)))]
        command += ["--rate", str(rate_hz), "--format", "raw", "--threads", "--function", "--output", str(out)]
        command += ["--subprocesses"] if with_children else []
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=for_s + GRACE_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise EngineError(f"py-spy did not end {GRACE_S:.0f} s after its time on process {pid}") from error
        if done.returncode == 0 and out.exists():
            return out.read_text()
        raise EngineError(why_not(pid, done.stderr))


def why_not(pid: int, stderr: str) -> str:
    """What py-spy said, in one line with the fix."""
    said = next((line.strip() for line in reversed(stderr.splitlines()) if line.strip()), "it gave no reason")
    if any(word in stderr.lower() for word in _DENIED):
        return (
            f"py-spy may not read process {pid}: run as its user, as root or with CAP_SYS_PTRACE "
            "(docker run --cap-add SYS_PTRACE), or set sysctl kernel.yama.ptrace_scope=0"
        )
    return f"py-spy could not read process {pid}: {said[:200]}"
