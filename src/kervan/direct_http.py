"""HTTP requests to servers of a fleet, of this machine and beside them, which no proxy of the environment knows."""

import http.client
import ssl
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from kervan.errors import ConfigError

NO_RESPONSE = (OSError, ValueError, http.client.HTTPException)  # what urllib raises
UNSENDABLE = frozenset(map(chr, range(33))) | {"\x7f"}  # http.client sends no such character in a URL


def parse_url(text: str, subject: str = "", example: str = "http://127.0.0.1:8000") -> str:
    """A base URL without `/v1` and slash at the end. `subject`: the option that it is of; `example`: for the error.

    Raises: ConfigError.
    """
    url = text if "//" in text else f"http://{text}"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), -1
    if (
        set(text) & UNSENDABLE
        or parts.scheme not in ("http", "https")
        or not parts.hostname
        or port == -1
        or parts.query
        or parts.fragment
    ):
        option = f"{subject} " if subject else ""
        raise ConfigError(f"{option}{text!r} is not a server URL; write one like {option}{example}")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def open_direct(
    url: str | urllib.request.Request, *, timeout_s: float, body: bytes | None = None, verify_tls: bool = True
) -> Any:
    """The response to a request that goes to its server directly: a context that ends it.

    Raises: those of NO_RESPONSE; URLError and HTTPError are kinds of OSError.
    """
    context = None if verify_tls else ssl._create_unverified_context()
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    return direct.open(url, body, timeout=timeout_s)


def reason(error: Exception) -> str:
    """Why there was no response, in one line of at most 200 characters."""
    return " ".join(str(getattr(error, "reason", None) or error).split())[:200] or type(error).__name__
