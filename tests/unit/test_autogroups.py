from pathlib import Path

import pytest

from kervan import autogroups


@pytest.mark.parametrize(
    ("release", "switch", "warns"),
    [
        ("6.18.44-fc-v657", "1\n", True),
        ("6.18.3", "1\n", True),
        ("6.18.44", "0\n", False),  # off
        ("6.18.44", None, False),  # a kernel without them
        ("6.18.45", "1\n", False),  # has the fix
        ("6.12.8-amd64", "1\n", False),
        ("6.18", "1\n", False),
    ],
)
def test_warning(
    release: str, switch: str | None, warns: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autogroups, "SWITCH", tmp_path / "switch")
    monkeypatch.setattr(autogroups.platform, "release", lambda: release)
    if switch is not None:
        (tmp_path / "switch").write_text(switch)
    told = autogroups.warning()
    assert (told is not None) == warns
    if told is not None:
        assert "sysctl -w kernel.sched_autogroup_enabled=0" in told
        assert "\n" not in told
