"""One file for ui.perfetto.dev: torch's trace, the engine's loop, the gateways' ranges and their requests. Pure.

Chrome's JSON, which Perfetto reads. All times are those of torch's trace, or of the first thing recorded without one.
Clocks are those of the nodes: what came from several is as exact as their clocks agree.
"""

import gzip
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

ENGINE_PID, GATEWAY_PID, REQUESTS_PID = 1_000_000_001, 1_000_001_000, 1_000_002_000  # above Linux' and torch's own


def merged(
    trace: bytes, engine: Mapping[str, Any] | None, gateways: Sequence[Mapping[str, Any]], *, replica: str
) -> bytes:
    """Compressed. `trace`: torch's, compressed or not, or empty."""
    file: dict[str, Any] = {"traceEvents": [], "displayTimeUnit": "ms"}
    if trace:
        file = msgspec.json.decode(gzip.decompress(trace) if trace[:2] == b"\x1f\x8b" else trace)
    base_ns = file.get("baseTimeNanoseconds", 0)
    if not base_ns:
        base_ns = min([told["begin_ns"] for told in (*gateways, *([engine] if engine is not None else []))], default=0)
    events = file["traceEvents"]
    if engine is not None:
        events += _process(ENGINE_PID, f"engine loop of {replica}")
        for name, begin_ns, end_ns, facts in engine["spans"]:
            events.append(_event(name, begin_ns - base_ns, end_ns - begin_ns, ENGINE_PID, 1, facts))
    for number, told in enumerate(gateways):
        pid = GATEWAY_PID + number
        events += _process(pid, f"gateway {told['gateway']}")
        for name, begin_ns, end_ns in told["spans"]:
            events.append(_event(name, begin_ns - base_ns, end_ns - begin_ns, pid, 1, {}))
        events += _process(REQUESTS_PID + number, f"requests of gateway {told['gateway']}")
        for row, timed in enumerate(told["requests"], 1):
            events += _request(timed, base_ns, REQUESTS_PID + number, row)
    return gzip.compress(msgspec.json.encode(file), compresslevel=6)


def _process(pid: int, name: str) -> Iterator[dict[str, Any]]:
    yield {"name": "process_name", "ph": "M", "pid": pid, "tid": 0, "args": {"name": name}}


def _request(timed: Mapping[str, Any], base_ns: int, pid: int, row: int) -> Iterator[dict[str, Any]]:
    """A row with the request's parts; of several streams the first, since a row shows one thing at a time."""
    request = timed["request"]
    zero_ns = round(timed["received_unix_s"] * 1e9) - base_ns
    yield _event(
        f"{request['path']} {request['stream_id'] or request['client_id']}".strip(),
        zero_ns, round(request["seconds"] * 1e9), pid, row, {"status": request["status"]},
    )  # fmt: skip
    for part in (*request["before"], *(part for stream in request["streams"][:1] for part in stream["parts"])):
        told = {key: part[key] for key in ("replica", "why", "tokens") if part.get(key)}
        yield _event(part["part"], zero_ns + round(part["start_s"] * 1e9), round(part["seconds"] * 1e9), pid, row, told)


def _event(name: str, begin_ns: int, dur_ns: int, pid: int, tid: int, args: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": name, "ph": "X", "cat": "kervan", "ts": begin_ns / 1e3, "dur": dur_ns / 1e3, "pid": pid, "tid": tid,
        "args": args,
    }  # fmt: skip
