"""A model's config.json by its Hugging Face id: from the cache of this machine, or else from the hub.

The cache and the variables are those of huggingface_hub, which the core does not need for two small files.
Source: https://huggingface.co/docs/huggingface_hub/guides/manage-cache and .../package_reference/environment_variables.
"""

import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kervan.errors import ConfigError
from kervan.facts import model as models

ENDPOINT = "https://huggingface.co"
TIMEOUT_S = 10.0
MAX_BYTES = 4 << 20
CONFIG = "config.json"
QUANTIZATION = "hf_quant_config.json"
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
TRUE_WORDS = ("1", "ON", "YES", "TRUE")
FETCH = "fetch its config.json into a directory and give the directory"


def read_config(model: str, environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """The content of `OWNER/NAME`'s config.json, with what hf_quant_config.json says beside it.

    Raises: ConfigError when the cache does not have it and the hub does not give it, or it is no model's.
    """
    cached = cached_snapshot(model, environ)
    if cached is not None and (found := models.read_config(str(cached))) is not None:
        return found
    for name in OFFLINE:
        if environ.get(name, "").upper() in TRUE_WORDS:
            raise ConfigError(
                f"model {model!r} is not in the Hugging Face cache ({cache(environ)}), and {name}="
                f"{environ[name]} forbids to ask the hub; unset it, or {FETCH}"
            )
    return _Hub(model, environ).read_config()


def cache(environ: Mapping[str, str] = os.environ) -> Path:
    """The directory of the cached repositories."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environ.get(name):
            return Path(os.path.expandvars(environ[name])).expanduser()
    if home := environ.get("HF_HOME"):
        return Path(os.path.expandvars(home)).expanduser() / "hub"
    caches = environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expandvars(caches)).expanduser() / "huggingface" / "hub"


def cached_snapshot(model: str, environ: Mapping[str, str] = os.environ) -> Path | None:
    """The cached files of the commit that `main` was when they were fetched; None without a config.json among them."""
    repository = cache(environ) / f"models--{model.replace('/', '--')}"
    try:
        commit = (repository / "refs" / "main").read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    snapshot = repository / "snapshots" / commit
    return snapshot if commit.isalnum() and (snapshot / CONFIG).is_file() else None


class _Hub:
    """Requests for the files of one model."""

    def __init__(self, model: str, environ: Mapping[str, str]) -> None:
        self.model = model
        self.endpoint = (environ.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")
        parts = urlsplit(self.endpoint)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ConfigError(f"HF_ENDPOINT={self.endpoint!r} is not a URL; write one like {ENDPOINT}, or unset it")
        self.token = environ.get("HF_TOKEN", "").strip() if parts.scheme == "https" else ""

    def read_config(self) -> dict[str, Any]:
        config = self._get(CONFIG)
        if config is None:
            raise ConfigError(
                f"model {self.model!r} has no config.json at {self.endpoint}, and a plan reads it; "
                "give a repository in Hugging Face format"
            )
        source = f"{self.endpoint}/{self.model}/{CONFIG}"
        found = models.parse_config(config, source)
        if not found.get("quantization_config") and (beside := self._get(QUANTIZATION)) is not None:
            found["quantization_config"] = models.parse_object(beside, f"{self.endpoint}/{self.model}/{QUANTIZATION}")
        return found

    def _get(self, file: str) -> bytes | None:
        """The file; None when the repository has none of that name.

        Raises: ConfigError when the hub refuses, cannot be reached, or sends too much.
        """
        url = f"{self.endpoint}/{self.model}/resolve/main/{file}"
        opener = urllib.request.build_opener(_Redirects)
        try:
            with opener.open(request(url, self.token), timeout=TIMEOUT_S) as response:
                return self._body(response, file)
        except urllib.error.HTTPError as error:
            with error:
                is_no_file = file == QUANTIZATION or error.headers.get("X-Error-Code") == "EntryNotFound"
                if error.code == 404 and is_no_file:
                    return None
                raise self._refused(error.code) from error
        except (OSError, HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise ConfigError(
                f"model {self.model!r} is not on this machine, and {self.endpoint} cannot be reached "
                f"({' '.join(str(reason).split())[:200] or type(error).__name__}); {FETCH}"
            ) from error

    def _body(self, response: Any, file: str) -> bytes:
        end_s = time.monotonic() + TIMEOUT_S
        body = b""
        while piece := response.read1(1 << 16):
            body += piece
            if len(body) > MAX_BYTES:
                raise ConfigError(
                    f"{file} of {self.model!r} has more than {MAX_BYTES:,} bytes at {self.endpoint}, which no model's "
                    "has; check the name and HF_ENDPOINT"
                )
            if time.monotonic() > end_s:
                raise TimeoutError(f"{file} took more than {TIMEOUT_S:g} s")
        return body

    def _refused(self, status: int) -> ConfigError:
        where = f"{self.endpoint} (HTTP {status})"
        if status not in (401, 403, 404):
            return ConfigError(f"model {self.model!r} is not on this machine, and not given by {where}; {FETCH}")
        if self.token:
            return ConfigError(
                f"model {self.model!r} is not at {where} for this HF_TOKEN; check the name, or ask for access at "
                f"{self.endpoint}/{self.model}"
            )
        return ConfigError(
            f"model {self.model!r} is neither on this machine nor open at {where}; check the name, or give HF_TOKEN "
            "if it is gated or private" + ("" if self.endpoint.startswith("https:") else " (sent over https only)")
        )


def request(url: str, token: str) -> urllib.request.Request:
    """A GET with the token, if there is one."""
    headers = {"User-Agent": "kervan"} | ({"Authorization": f"Bearer {token}"} if token else {})
    return urllib.request.Request(url, headers=headers)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects as urllib does, which would send the token along to any host."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        following = super().redirect_request(req, fp, code, msg, headers, newurl)
        if following is not None:
            before, after = urlsplit(req.full_url), urlsplit(following.full_url)
            if after.scheme not in ("http", "https") or (before.scheme, after.scheme) == ("https", "http"):
                raise urllib.error.URLError(f"it redirects to {after.scheme}://{after.netloc}")
            if (before.scheme, before.netloc) != (after.scheme, after.netloc):
                following.remove_header("Authorization")
        return following
