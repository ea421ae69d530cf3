"""Ray's token authentication, as a process that joins a cluster meets it.

Ray ends the process (abort, with a stack trace) for a token that it cannot find or send, so its settings are looked at
before. What Ray reads, in this order (its `authentication_token_loader.cc`): RAY_AUTH_TOKEN, the file
RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token. It sends nothing unless RAY_AUTH_MODE=token. The Ray that kervan starts has a
token of its own, whatever these say.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from kervan.errors import FleetError
from kervan.serve.ray_internals import KUBERNETES_AUTH_VARIABLE

MODES = ("token", "disabled")
GET_TOKEN = "`ray get-auth-token` on the cluster's head prints it"
SET_TOKEN = f"set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file, to the token of the cluster ({GET_TOKEN})"


class _Found(NamedTuple):
    """A token, and where it is: a name for messages."""

    source: str
    token: str


def check_settings(cluster: str) -> None:
    """Look at the authentication settings of this process, which is about to join `cluster`, a noun for messages.

    Raises: FleetError for what Ray would end this process for, or take for something else.
    """
    mode = os.environ.get("RAY_AUTH_MODE", "")
    if mode and mode.lower() not in MODES:
        raise FleetError(
            f"RAY_AUTH_MODE={mode} is not a mode of Ray's authentication, which takes it for disabled; set it to token "
            "if the cluster has a token, or unset it"
        )
    if not sends_token(os.environ) or _is_kubernetes(os.environ):
        return
    found = _find(os.environ)
    if found is None:
        raise FleetError(
            f"RAY_AUTH_MODE=token, but there is no token for {cluster}: RAY_AUTH_TOKEN and "
            f"RAY_AUTH_TOKEN_PATH are not set, and {_default_path(os.environ)} does not exist; {SET_TOKEN}"
        )
    if not found.token:
        raise FleetError(f"there is no token in {found.source}; {SET_TOKEN}")
    if not (found.token.isascii() and found.token.isprintable()):
        raise FleetError(
            f"the token in {found.source} has characters that Ray cannot send: only printable ASCII on one line; "
            f"{SET_TOKEN}"
        )


def refusal(cluster: str = "the Ray cluster") -> str:
    """Why `cluster` refused what this process sent, with the fix; one line."""
    found = None if _is_kubernetes(os.environ) else _find(os.environ)
    if sends_token(os.environ):
        source = found.source if found else "the Kubernetes service account"
        return f"the token in {source} is not that of {cluster}; {SET_TOKEN}"
    mode = os.environ.get("RAY_AUTH_MODE")
    unsent = f"with RAY_AUTH_MODE={mode}" if mode is not None else "without RAY_AUTH_MODE"
    fix = f"set RAY_AUTH_MODE=token, which sends that in {found.source}" if found and found.token else (
        f"set RAY_AUTH_MODE=token, and {SET_TOKEN.removeprefix('set ')}"
    )  # fmt: skip
    return f"{cluster} requires a token, and {unsent} none is sent; {fix}"


def sends_token(environ: Mapping[str, str]) -> bool:
    """Whether Ray sends a token to a cluster that is joined by its address."""
    return environ.get("RAY_AUTH_MODE", "").lower() == "token"


def has_token(environ: Mapping[str, str]) -> bool:
    """Whether Ray would find a token, sent or not."""
    found = _find(environ)
    return found is not None and bool(found.token)


def _find(environ: Mapping[str, str]) -> _Found | None:
    """The token that Ray would take, empty where it is named but not there; None where nothing names one."""
    if token := environ.get("RAY_AUTH_TOKEN"):
        return _Found("RAY_AUTH_TOKEN", token.strip())
    if path := environ.get("RAY_AUTH_TOKEN_PATH"):
        return _Found(f"{path} (RAY_AUTH_TOKEN_PATH)", _read(Path(path)))
    default = _default_path(environ)
    return _Found(str(default), token) if "HOME" in environ and (token := _read(default)) else None


def _read(path: Path) -> str:
    """What a file has; nothing for one that cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _default_path(environ: Mapping[str, str]) -> Path:
    return Path(environ.get("HOME", "~")) / ".ray" / "auth_token"  # Ray asks nothing else for the home directory


def _is_kubernetes(environ: Mapping[str, str]) -> bool:
    """Whether tokens are those of Kubernetes' service accounts, which Ray finds by itself."""
    return environ.get(KUBERNETES_AUTH_VARIABLE, "").lower() in ("1", "true")
