"""What a gateway's loop does for a while, when `kervan profile` asks: named ranges, its CPU time, its requests."""

import asyncio
import inspect
import time
import urllib.parse
from collections.abc import Callable
from typing import Any

import msgspec

from kervan.errors import ConfigError
from kervan.fleet.wrapped import Wrapped
from kervan.gateway import explain
from kervan.gateway.active import active_s
from kervan.gateway.remembered import RequestMemory

PATH = "/kervan/profile"  # of the internal port, for those who know the fleet's secret
MAX_FOR_S = 600.0
MAX_SPANS = 20_000  # kept one by one; all are counted
MAX_REQUESTS = 500


class RangesAsk(msgspec.Struct, frozen=True):
    """`has_ranges` False: nothing is wrapped, and CPU time and requests are told."""

    for_s: float
    has_ranges: bool = True


class RangeTotal(msgspec.Struct):
    """How often something was done, and for how long."""

    calls: int = 0
    seconds: float = 0.0


class TimedRequest(msgspec.Struct):
    """A request, and when it was received."""

    received_unix_s: float
    request: explain.RequestExplained


class GatewayRecord(msgspec.Struct):
    """What a gateway did between two moments (nanoseconds since 1970).

    `cpu_s`: of its process; `active_s`: for which its loop's thread ran, or waited for a core; `tokens`: that its
    clients got. `spans`: (name, begin, end), the first `MAX_SPANS`.
    `requests`: that were in flight, the newest `MAX_REQUESTS`.
    """

    gateway: str
    begin_ns: int
    end_ns: int
    cpu_s: float
    active_s: float
    tokens: int
    totals: dict[str, RangeTotal]
    spans: list[tuple[str, int, int]]
    requests: list[TimedRequest]


def parse_ask(query: bytes) -> RangesAsk:
    """Of a query string like `for_s=10&has_ranges=1`. Raises: ConfigError."""
    given = dict(urllib.parse.parse_qsl(query.decode("latin-1")))
    try:
        for_s = float(given.get("for_s", ""))
    except ValueError:
        for_s = -1.0
    if not 0 < for_s <= MAX_FOR_S:
        raise ConfigError(f"for_s {given.get('for_s')!r} is outside 0..{MAX_FOR_S:g} s; write for example for_s=10")
    return RangesAsk(for_s, given.get("has_ranges") != "0")


async def record(
    ask: RangesAsk, fleet: Any, engine: Any, memory: RequestMemory | None, *, gateway_id: str
) -> GatewayRecord:
    """Record for as long as is asked. `fleet`: the fleet client; `engine`: vLLM's AsyncLLM over it."""
    recorder, wrapped = _Recorder(), Wrapped()
    begin_ns, began_s, tokens = time.time_ns(), time.monotonic(), _num_tokens(fleet)
    cpu_s, was_active_s = time.process_time(), active_s()
    try:
        if ask.has_ranges:
            wrapped.wrap(fleet._placements, "_choose", recorder.around("routing"))
            wrapped.wrap(fleet.codec, "encode_add", recorder.around("encode request"))
            wrapped.wrap(fleet.codec, "decode", recorder.around("decode outputs"))
            wrapped.wrap(engine.output_processor, "process_outputs", recorder.around("detokenisation"))
            wrapped.wrap(getattr(engine, "renderer", None), "tokenize_prompt_async", recorder.around("tokenisation"))
        await asyncio.sleep(ask.for_s)
    finally:
        wrapped.restore()
    now_s, end_ns = time.monotonic(), time.time_ns()
    return GatewayRecord(
        gateway_id,
        begin_ns,
        end_ns,
        cpu_s=time.process_time() - cpu_s,
        active_s=active_s() - was_active_s,
        tokens=_num_tokens(fleet) - tokens,
        totals=recorder.totals,
        spans=recorder.spans,
        requests=[
            TimedRequest(found.received_unix_s, explain.explained(found, gateway=gateway_id, now_s=now_s))
            for found in (memory.since(began_s, MAX_REQUESTS) if memory is not None else ())
        ],
    )


def _num_tokens(fleet: Any) -> int:
    ids = {*fleet.tallies, *(link.replica_id for link in fleet.links)}
    return sum(fleet.generated_tokens(replica_id) for replica_id in ids)


class _Recorder:
    """Counts calls, and keeps the first of them. Those in other threads too: each only appends."""

    def __init__(self) -> None:
        self.totals: dict[str, RangeTotal] = {}
        self.spans: list[tuple[str, int, int]] = []

    def around(self, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        total = self.totals.setdefault(name, RangeTotal())

        def wrap(method: Callable[..., Any]) -> Callable[..., Any]:
            def note(begin_ns: int) -> None:
                end_ns = time.time_ns()
                total.calls += 1
                total.seconds += (end_ns - begin_ns) / 1e9
                if len(self.spans) < MAX_SPANS:
                    self.spans.append((name, begin_ns, end_ns))

            def call(*args: Any, **kwargs: Any) -> Any:
                begin_ns = time.time_ns()
                try:
                    return method(*args, **kwargs)
                finally:
                    note(begin_ns)

            async def call_async(*args: Any, **kwargs: Any) -> Any:
                begin_ns = time.time_ns()
                try:
                    return await method(*args, **kwargs)
                finally:
                    note(begin_ns)

            return call_async if inspect.iscoroutinefunction(method) else call

        return wrap
