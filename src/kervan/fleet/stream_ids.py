"""vLLM's ids of streams, and the request's id in them: the client's X-Request-Id, or the one that the gateway gave it.

vLLM puts the kind of the answer before it, `1_` before that for a second choice, `-0` behind it for a prompt of
several, and in newer versions eight characters more; kervan a `~1` for a stream that has moved.
"""

import re
from collections.abc import Mapping

from kervan.fleet.timeline import trace_id

# By endpoint.
PREFIXES = ("chatcmpl-", "cmpl-", "resp_", "embd-", "score-", "rerank-", "generate-", "generate-tokens-", "pool-")
MOVED = re.compile(r"~\d+$")
CHOICE = re.compile(r"^\d+_")
DRAWN = re.compile(r"-[0-9a-f]{8}$")
PROMPT = re.compile(r"-\d{1,4}$")


def request_id(stream_id: str) -> str:
    """The request's id, as far as it can be told from a stream's: what looks like vLLM's own endings is left out."""
    found = DRAWN.sub("", CHOICE.sub("", MOVED.sub("", stream_id)))
    kind = next((kind for kind in PREFIXES if found.startswith(kind)), "")
    found = found.removeprefix(kind)
    return PROMPT.sub("", found) if kind == "cmpl-" else found


def ids(stream_id: str, trace_headers: Mapping[str, str] | None = None) -> dict[str, str]:
    """What log lines about a stream have. `trace_headers`: that its request came with."""
    traceparent = (trace_headers or {}).get("traceparent", "")
    return {"stream": stream_id, "request_id": request_id(stream_id), "trace_id": trace_id(traceparent)}
