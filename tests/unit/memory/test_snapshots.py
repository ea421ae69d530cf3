"""Who holds the peak, of a history in the format of torch.cuda.memory._dump_snapshot."""

import pickle
from pathlib import Path
from typing import Any

import pytest

from kervan.errors import ConfigError
from kervan.memory import snapshots


def event(action: str, addr: int, size: int, *lines: tuple[str, int, str]) -> dict[str, Any]:
    frames = [{"filename": name, "line": line, "name": function} for name, line, function in lines]
    return {"action": action, "addr": addr, "size": size, "stream": 0, "time_us": 0, "frames": frames}


LAYER = ("/x/torch/nn/functional.py", 9, "silu"), ("/x/src/kervan/memory/decoder.py", 12, "forward")
LOSS = ("/x/torch/nn/functional.py", 5, "cross_entropy"), ("/x/src/kervan/memory/decoder.py", 40, "loss_of")


def test_the_lines_that_hold_the_peak_come_largest_first() -> None:
    trace = [
        event("alloc", 1, 100, *LAYER),
        event("alloc", 2, 100, *LAYER),
        event("alloc", 3, 900, *LOSS),
        event("free_requested", 3, 900),
        event("free_completed", 3, 900),
        event("alloc", 3, 50, ("??", 0, "cudaGraphLaunch")),  # the address again, and a smaller sum
        event("segment_alloc", 4, 1 << 30),
    ]
    found = snapshots.holders({"device_traces": [[], trace]})
    assert [(holder.where, holder.size_bytes, holder.count) for holder in found] == [
        ("decoder.py:40 loss_of", 900, 1),
        ("decoder.py:12 forward", 200, 2),
    ]
    assert found[0].to_dict()["bytes"] == 900


def test_what_no_line_of_ours_holds_is_named_by_what_there_is() -> None:
    trace = [
        event("alloc", 1, 3, ("/home/me/train.py", 7, "main")),
        event("alloc", 2, 2, ("??", 0, "at::native::add")),
        event("alloc", 3, 1),
    ]
    names = [holder.where for holder in snapshots.holders({"device_traces": [trace]})]
    assert names == ["train.py:7 main", "at::native::add", "(autograd, or no Python frame)"]


class _Evil:
    def __reduce__(self) -> Any:
        return print, ("run",)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"no pickle", "is no memory snapshot"),
        (pickle.dumps({"segments": []}), "holds no device_traces"),
        (pickle.dumps(_Evil()), "a snapshot holds plain values alone"),
    ],
)
def test_files_that_are_no_snapshot_are_refused_and_never_run(
    tmp_path: Path, content: bytes, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "s.pickle"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        snapshots.read(file)
    assert capsys.readouterr().out == ""
    with pytest.raises(ConfigError, match="cannot be read"):
        snapshots.read(tmp_path / "none")
