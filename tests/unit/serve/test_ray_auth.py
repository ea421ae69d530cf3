"""What is wrong with Ray's settings of authentication, told before Ray ends the process for it."""

from pathlib import Path

import pytest

from kervan.errors import FleetError
from kervan.serve import ray_auth

CLUSTER = "the Ray cluster at h:1"


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", ray_auth.KUBERNETES_AUTH_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def setting(monkeypatch: pytest.MonkeyPatch, home: Path, variables: str) -> None:
    for variable in variables.split():
        name, _, value = variable.partition("=")
        monkeypatch.setenv(name, value.format(home=home).replace("_SPACE_", " ").replace("_LINE_", "\n"))


@pytest.mark.parametrize(
    "variables",
    [
        "",
        "RAY_AUTH_MODE=",
        "RAY_AUTH_MODE=disabled",
        "RAY_AUTH_MODE=Disabled RAY_AUTH_TOKEN_PATH={home}/missing",
        "RAY_AUTH_MODE=token RAY_AUTH_TOKEN=abc_LINE_",
        "RAY_AUTH_MODE=TOKEN RAY_AUTH_TOKEN= RAY_AUTH_TOKEN_PATH={home}/token",
        "RAY_AUTH_MODE=token RAY_ENABLE_K8S_TOKEN_AUTH=true",
    ],
)
def test_legal_settings(monkeypatch: pytest.MonkeyPatch, home: Path, variables: str) -> None:
    (home / "token").write_text("abc\n")
    setting(monkeypatch, home, variables)
    ray_auth.check_settings(CLUSTER)


def test_the_token_in_the_home_directory(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("abc")
    ray_auth.check_settings(CLUSTER)
    monkeypatch.delenv("HOME")
    with pytest.raises(FleetError, match=r"~/\.ray/auth_token does not exist"):
        ray_auth.check_settings(CLUSTER)


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ("RAY_AUTH_MODE=nonsense", "RAY_AUTH_MODE=nonsense is not a mode of Ray's authentication"),
        ("RAY_AUTH_MODE=token", "there is no token for the Ray cluster at h:1: RAY_AUTH_TOKEN and RAY_AUTH_TOKEN_PATH are"),
        ("RAY_AUTH_MODE=token RAY_AUTH_TOKEN=_SPACE_", "there is no token in RAY_AUTH_TOKEN; set RAY_AUTH_TOKEN, or"),
        ("RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={home}/missing", "missing (RAY_AUTH_TOKEN_PATH); set RAY_AUTH_TOKEN,"),
        ("RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={home}", "(RAY_AUTH_TOKEN_PATH); set RAY_AUTH_TOKEN, or"),
        ("RAY_AUTH_MODE=token RAY_AUTH_TOKEN=a_LINE_b", "the token in RAY_AUTH_TOKEN has characters that Ray cannot send"),
        ("RAY_AUTH_MODE=token RAY_AUTH_TOKEN=\u00fc", "the token in RAY_AUTH_TOKEN has characters that Ray cannot send"),
    ],
)  # fmt: skip
def test_what_ray_would_end_the_process_for(
    monkeypatch: pytest.MonkeyPatch, home: Path, variables: str, told: str
) -> None:
    setting(monkeypatch, home, variables)
    with pytest.raises(FleetError) as failure:
        ray_auth.check_settings(CLUSTER)
    assert told in str(failure.value)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ("", "the Ray cluster at h:1 requires a token, and without RAY_AUTH_MODE none is sent; set RAY_AUTH_MODE=token, and"),
        ("RAY_AUTH_MODE=disabled", "and with RAY_AUTH_MODE=disabled none is sent; set RAY_AUTH_MODE=token, and"),
        ("RAY_AUTH_TOKEN=abc", "none is sent; set RAY_AUTH_MODE=token, which sends that in RAY_AUTH_TOKEN"),
        ("RAY_AUTH_MODE=token RAY_AUTH_TOKEN=abc", "the token in RAY_AUTH_TOKEN is not that of the Ray cluster at h:1; set"),
        ("RAY_AUTH_MODE=token RAY_ENABLE_K8S_TOKEN_AUTH=1", "the token in the Kubernetes service account is not that of"),
    ],
)  # fmt: skip
def test_why_a_cluster_refused(monkeypatch: pytest.MonkeyPatch, home: Path, variables: str, told: str) -> None:
    setting(monkeypatch, home, variables)
    assert told in ray_auth.refusal(CLUSTER)
