"""Whether an engine that makes no step hangs in a collective, and for which of its ranks the others wait.

Its workers are asked where they are. A long step looks different each time, or nobody waits in it; a hang is sure when
`SURE_LOOKS` looks in a row find the same ranks in the same places. Where no rank stands out, NCCL's own report (RAS) is
asked, which counts the collectives that each rank has launched.
"""

import re
import time
from collections.abc import Mapping
from pathlib import Path

from kervan.ranks import ras, stacks
from kervan.ranks.stacks import Verdict

LOOK_AFTER_S = 5.0
PERIOD_S = 3.0
SURE_LOOKS = 3
WAIT_S = 1.0
NAME = re.compile(r"stack-(\d+)-(\d+)")


def dump_path(directory: Path, rank: int, pid: int) -> Path:
    """The file in which a worker writes its stacks."""
    return directory / f"stack-{rank}-{pid}"


class RankWatch:
    """Looks at the workers whose files are in a directory. `hang`: what is sure; empty if nothing is."""

    def __init__(self, directory: Path, environ: Mapping[str, str]) -> None:
        self.hang = ""
        self._directory = directory
        self._environ = environ
        self._looked_s = 0.0
        self._last: tuple[object, ...] = ()
        self._same = 0
        self._said = ""

    def look(self, stalled_s: float) -> str:
        """What the ranks of an engine do that has made no step for so long; empty if that is not long, or not known."""
        if stalled_s < LOOK_AFTER_S:
            self.hang, self._said, self._same, self._last = "", "", 0, ()
            return ""
        if (now_s := time.monotonic()) - self._looked_s < PERIOD_S:
            return self._said
        self._looked_s = now_s
        ranks = self._ranks()
        if len(ranks) < 2:
            return ""
        seen = stacks.look([(rank, pid, path) for rank, pid, path in ranks], wait_s=WAIT_S)
        verdict = stacks.judge(seen)
        if not verdict.ranks:
            verdict = self._ask_nccl({pid for _, pid, _ in ranks}) or verdict
        places: tuple[object, ...] = (verdict.kind, verdict.reason)
        self._same = self._same + 1 if places == self._last else 1
        self._last = places
        is_sure = verdict.kind == "collective" and self._same >= SURE_LOOKS
        self.hang = verdict.reason if is_sure else ""
        self._said = "" if verdict.kind == "unknown" else verdict.reason
        return self._said

    def _ranks(self) -> list[tuple[int, int, Path]]:
        found = []
        for path in self._directory.glob("stack-*"):
            if match := NAME.fullmatch(path.name):
                found.append((int(match[1]), int(match[2]), path))
        return sorted(found)

    def _ask_nccl(self, pids: set[int]) -> Verdict | None:
        """What NCCL's report says of these processes; None if it says nothing, or there is no report."""
        report = ras.ask(self._environ, timeout_s=WAIT_S)
        for problem in () if report is None else report.problems:
            if any(f"pid {pid} " in who for who in problem.who for pid in pids):
                return Verdict("collective", f"a collective hangs; NCCL reports {problem}")
        return None
