"""Who holds the peak, of a memory history that torch's GPU allocator has recorded.

The file is what `torch.cuda.memory._dump_snapshot` writes: a pickle of a dict with "device_traces", a list of events
for each device with action, addr, size and frames. It is read without torch, and loads nothing but plain values.
"""

import io
import pickle
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kervan.errors import ConfigError

OURS = "/kervan/"
NOT_INTERESTING = ("/torch/", "<frozen", "/runpy", "/multiprocessing/")


@dataclass(frozen=True, slots=True)
class Holder:
    """Memory that one line of code had at the peak."""

    where: str
    size_bytes: int
    count: int

    def to_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {"where": self.where, "bytes": self.size_bytes, "gib": round(self.size_bytes / 2**30, 4),
                "blocks": self.count}  # fmt: skip


class _Plain(pickle.Unpickler):
    """Refuses everything that is not built in: a pickle can run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}, and a snapshot holds plain values alone")


def read(path: Path) -> dict[str, Any]:
    """A snapshot. Raises: ConfigError for a file that is none."""
    try:
        found = _Plain(io.BytesIO(path.read_bytes())).load()
    except OSError as error:
        raise ConfigError(f"snapshot {path} cannot be read: {error.strerror}") from error
    except Exception as error:
        raise ConfigError(
            f"{path} is no memory snapshot ({error}); make one with torch.cuda.memory._dump_snapshot or "
            "kervan memory measure --snapshots DIR"
        ) from error
    if not isinstance(found, dict) or not isinstance(found.get("device_traces"), list):
        raise ConfigError(f"{path} holds no device_traces; make it with kervan memory measure --snapshots DIR")
    return found


def holders(snapshot: dict[str, Any], *, most: int = 15) -> list[Holder]:
    """Lines of code by what they had allocated when the sum was highest, the largest first.

    The device with the highest sum counts. What was allocated before the history began is not in it.
    """
    best: dict[int, tuple[int, str]] = {}
    best_bytes = 0
    for trace in snapshot["device_traces"]:
        live, size = _peak(trace)
        if size > best_bytes:
            best, best_bytes = live, size
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for block_bytes, where in best.values():
        sums[where][0] += block_bytes
        sums[where][1] += 1
    found = [Holder(where, size, count) for where, (size, count) in sums.items()]
    return sorted(found, key=lambda holder: -holder.size_bytes)[:most]


def _peak(trace: list[dict[str, Any]]) -> tuple[dict[int, tuple[int, str]], int]:
    """Blocks that live at the highest sum, by address, and that sum. Two passes: the moment, then what lives at it."""
    now, highest, moment = 0, 0, -1
    sizes: dict[int, int] = {}
    for index, event in enumerate(trace):
        if event["action"] == "alloc":
            sizes[event["addr"]] = event["size"]
            now += event["size"]
            if now > highest:
                highest, moment = now, index
        elif event["action"] == "free_completed":
            now -= sizes.pop(event["addr"], 0)
    live: dict[int, tuple[int, str]] = {}
    for event in trace[: moment + 1]:
        if event["action"] == "alloc":
            live[event["addr"]] = event["size"], _where(event.get("frames") or [])
        elif event["action"] == "free_completed":
            live.pop(event["addr"], None)
    return live, highest


def _where(frames: list[dict[str, Any]]) -> str:
    """The innermost line of ours; else of anybody's but torch's; else what there is."""
    lines = [frame for frame in frames if frame["filename"].endswith(".py")]
    ours = [frame for frame in lines if OURS in frame["filename"]]
    theirs = [frame for frame in lines if not any(part in frame["filename"] for part in NOT_INTERESTING)]
    if found := (ours or theirs)[:1]:
        return f"{Path(found[0]['filename']).name}:{found[0]['line']} {found[0]['name']}"
    return f"{frames[0]['name']}" if frames else "(autograd, or no Python frame)"
