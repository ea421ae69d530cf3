"""What a request says of the session that it belongs to, by the names that OpenAI's and vLLM's APIs have for that.

`session_id` and the header `X-Session-ID` are vLLM's (0.32); `prompt_cache_key` and, before it, `user` are OpenAI's.
"""

import hashlib
import re
from typing import Any

import msgspec

from kervan.gateway.asgi import Scope, header

SESSION_HEADER = b"x-session-id"
MAX_CHARS = 256  # of a name that is kept as it is
_HAS_NAME = re.compile(rb'"(?:session_id|prompt_cache_key|user)"\s*:')  # a message has "user" too, as a value


class _Named(msgspec.Struct):
    session_id: Any = None
    prompt_cache_key: Any = None
    user: Any = None


_decoder = msgspec.json.Decoder(_Named)


def read(scope: Scope, body: bytes) -> str:
    """The session's name, the most exact of those that are given; empty without one."""
    name: Any = header(scope, SESSION_HEADER).decode("latin-1")
    if not name and _HAS_NAME.search(body) is not None:
        try:
            named = _decoder.decode(body)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            return ""
        name = named.session_id or named.prompt_cache_key or named.user
    if not isinstance(name, str):
        return ""
    return name if len(name) <= MAX_CHARS else hashlib.blake2s(name.encode("utf-8", "surrogatepass")).hexdigest()
