"""Where fleets are remembered, and what is said where that cannot be."""

import os
import pwd
from functools import partial
from pathlib import Path

import pytest

from kervan.errors import FleetError
from kervan.serve import cluster, down, ray_errors, ray_internals
from kervan.serve.cluster import NoClusterError, Remembered
from kervan.serve.directory.client import NoFleetError


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("KERVAN_HOME", str(tmp_path))
    return tmp_path


def test_a_home_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.delenv("KERVAN_HOME", raising=False)
    monkeypatch.setenv("HOME", str(file))
    asked = (cluster.recall, cluster.forget)
    for ask in (cluster.check_home, cluster.find_local_ray, *(partial(ask, "chat") for ask in asked)):
        with pytest.raises(FleetError, match=r"Not a directory\); set KERVAN_HOME to a directory") as failure:
            ask()
        assert f"{file}/.kervan" in str(failure.value)
    monkeypatch.setattr(cluster.tempfile, "gettempdir", lambda: str(tmp_path))
    assert cluster.log_directory() == tmp_path / f"kervan-logs-{os.getuid()}"


def test_a_user_without_a_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container with a user id that its image does not know."""

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.delenv("KERVAN_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    with pytest.raises(FleetError, match=r"has no home directory; set KERVAN_HOME"):
        cluster.find_local_ray()


def test_a_home_that_is_made(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERVAN_HOME", str(home / "new"))
    assert (cluster.find_local_ray(), cluster.remembered()) == (None, [])
    cluster.check_home()
    assert [path.name for path in (home / "new").iterdir()] == ["fleets"]
    assert cluster.log_directory() == home / "new" / "logs"


@pytest.mark.parametrize("error", [NoClusterError("refused"), NoFleetError("gone"), FleetError("requires a token")])
@pytest.mark.parametrize("is_joined", [True, False])
@pytest.mark.usefixtures("home")
def test_a_fleet_whose_cluster_does_not_let_us_in_is_not_forgotten(
    monkeypatch: pytest.MonkeyPatch, error: FleetError, is_joined: bool
) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(down, "attach", refuse)
    cluster.remember(Remembered("chat", "10.0.0.1:6379", "http://10.0.0.1:8000", is_joined))
    if is_joined and type(error) is FleetError:
        with pytest.raises(FleetError, match="requires a token"):
            down.down("chat")
        assert cluster.recall("chat")
    else:  # with the Ray that kervan started, or the cluster, the fleet is gone
        assert down.down("chat") == "stopped"
        assert cluster.recall("chat") is None


def test_what_ray_logs_is_kept_back_for_one_error_only(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(PermissionError), ray_errors.unsaid(PermissionError):
        os.write(2, b"before it")
        raise PermissionError
    assert capfd.readouterr().err == ""
    with pytest.raises(KeyError), ray_errors.unsaid(PermissionError):
        os.write(2, b"of something else")
        raise KeyError
    assert capfd.readouterr().err == "of something else"


def test_gateways_of_a_ray_of_ours_with_haproxy_leave_in_seconds() -> None:
    """Serve keeps them for 30 s, which `kervan down` would wait for."""
    with_haproxy = cluster.ray_environment("token", has_haproxy=True)
    assert float(with_haproxy[ray_internals.DRAINING_VARIABLE]) < 10
    assert with_haproxy.items() > cluster.ray_environment("token").items()


def test_a_ray_of_kervans_gets_no_api_keys_in_its_environment() -> None:
    given = {"KERVAN_API_KEY": "a", "KERVAN_API_KEYS": "w:b", "KERVAN_NEW_KEY": "c", "KERVAN_HOME": "h", "PATH": "p"}
    assert cluster.without_keys(given) == {"KERVAN_HOME": "h", "PATH": "p"}
