"""vLLM's messages without vLLM: positions of fields come from the gateway's HELLO, and the rest is msgpack.

vLLM's structs are arrays on the wire and leave out what stands at its default at their end, so a twin reads and writes
a few fields and need not know the others. `SamplingParams` is a map without its defaults; the three defaults below
are vLLM's (a contract test compares them).
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import msgspec

from kervan.fleet import stream_ids, wire
from kervan.fleet.sessions import RefusalError
from kervan.sim.prefix_cache import Media, PrefixCacheCounts
from kervan.twin.token_engine import TwinOutput, TwinRequest

logger = logging.getLogger(__name__)

ADD, ABORT, UTILITY = b"\x00", b"\x01", b"\x03"
FINISH = {"stop": 0, "length": 1}
QUEUED, SCHEDULED = 1, 2  # vLLM's EngineCoreEventType

MAX_TOKENS_DEFAULT, MIN_TOKENS_DEFAULT, IGNORE_EOS_DEFAULT = 16, 0, False

# What a twin says to vLLM's utility calls; None to those that are not listed.
UTILITY_ANSWERS: dict[str, Any] = {
    "get_supported_tasks": ["generate"],
    "is_sleeping": False,
    "is_scheduler_paused": False,
    "add_lora": True,
    "remove_lora": True,
    "pin_lora": True,
    "list_loras": [],
}
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode


@dataclass(frozen=True, slots=True)
class UtilityCall:
    """A call of a method of the engine."""

    id: int
    method: str
    args: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What vLLM's scheduler says of itself after a step. `prefix_cache`: since it was last told."""

    num_running: int
    num_waiting: int
    kv_cache_usage: float
    prefix_cache: PrefixCacheCounts


class LayoutError(RefusalError):
    """The gateway's layouts lack a field that a twin needs."""


class GatewayWire:
    """Reads requests of one gateway and writes outputs for it.

    Raises: LayoutError.
    """

    def __init__(self, layouts: dict[str, list[str]]):
        request = _positions(layouts, "EngineCoreRequest")
        self._id, self._prompt, self._sampling = (
            _need(request, name) for name in ("request_id", "prompt_token_ids", "sampling_params")
        )
        self._lora, self._salt, self._media = (
            _need(request, name) for name in ("lora_request", "cache_salt", "mm_features")
        )
        self._trace = request.get("trace_headers", len(request))
        output = _positions(layouts, "EngineCoreOutput")
        if (_need(output, "request_id"), _need(output, "new_token_ids")) != (0, 1):
            raise LayoutError("EngineCoreOutput does not begin with request_id, new_token_ids")
        self._finish, self._stop = _need(output, "finish_reason"), _need(output, "stop_reason")
        self._events, self._prefill = _need(output, "events"), output.get("prefill_stats")
        outputs = _positions(layouts, "EngineCoreOutputs")
        self._outputs, self._time = _need(outputs, "outputs"), _need(outputs, "timestamp")
        self._utility = _need(outputs, "utility_output")
        self._stats = _need(outputs, "scheduler_stats")
        self._head: list[Any] = [0] + [None] * self._utility  # engine_index, then what stands at its default

    def read_request(self, frame: bytes | memoryview, client: int) -> TwinRequest:
        """The request in an ADD.

        Raises: msgspec.MsgspecError, LookupError, TypeError for what is no request.
        """
        fields = _decode(frame)
        sampling = fields[self._sampling] or {}
        max_tokens = sampling.get("max_tokens", MAX_TOKENS_DEFAULT)
        generated = (sampling.get("extra_args") or {}).get(wire.GENERATED, ())  # a moved stream's
        if generated:
            name, trace = fields[self._id], fields[self._trace] if self._trace < len(fields) else None
            logger.info(
                "stream %s goes on here after %d tokens", name, len(generated), extra=stream_ids.ids(name, trace)
            )
        return TwinRequest(
            id=fields[self._id],
            client=client,
            prompt=[*fields[self._prompt], *generated],
            max_tokens=(max_tokens if max_tokens is not None else 2**31) - len(generated),
            min_tokens=sampling.get("min_tokens", MIN_TOKENS_DEFAULT) - len(generated),
            ignore_eos=sampling.get("ignore_eos", IGNORE_EOS_DEFAULT),
            stop_tokens=frozenset(sampling.get("stop_token_ids") or ()),
            scope=(_lora_name(fields[self._lora]), fields[self._salt]),
            media=tuple(map(_read_media, fields[self._media] or ())),
            reads_cache=not sampling.get("skip_reading_prefix_cache"),
        )

    def outputs(self, outputs: Sequence[TwinOutput], now_s: float, stats: EngineStats | None = None) -> bytes:
        """EngineCoreOutputs with one token for each; `stats` as its SchedulerStats."""
        rows: list[list[Any]] = []
        for output in outputs:
            row: list[Any] = [output.id, [output.token]]
            if output.finish is not None:
                row += [None] * (self._stop - 1)
                row[self._finish] = FINISH[output.finish]
                row[self._stop] = output.stop_token
            first = output.first
            if first is not None:
                last = max(self._events, self._prefill or 0)
                row += [None] * (last + 1 - len(row))
                row[self._events] = [
                    {"type": QUEUED, "timestamp": first.queued_s},
                    {"type": SCHEDULED, "timestamp": first.scheduled_s},
                ]
                if self._prefill is not None:
                    row[self._prefill] = {
                        "num_prompt_tokens": first.prompt_tokens,
                        "num_computed_tokens": first.prompt_tokens - first.cached_tokens,
                        "num_cached_tokens": first.cached_tokens,
                        "num_local_cached_tokens": first.cached_tokens,
                        "num_cache_creation_tokens": first.stored_tokens,
                    }
            rows.append(row)
        message = self._head[: self._time + 1]
        message[self._outputs], message[self._time] = rows, now_s
        if stats is not None:
            message[self._stats] = {
                "num_running_reqs": stats.num_running,
                "num_waiting_reqs": stats.num_waiting,
                "kv_cache_usage": stats.kv_cache_usage,
                "prefix_cache_stats": asdict(stats.prefix_cache),
            }
        return _encode(message)

    def answer(self, call: UtilityCall, value: Any, now_s: float) -> bytes:
        """The answer to a UTILITY, as EngineCoreOutputs."""
        message = list(self._head)
        message[self._outputs], message[self._time] = [], now_s
        message[self._utility] = [call.id, None, [None, value]]
        return _encode(message)


def read_call(frame: bytes | memoryview) -> UtilityCall:
    """The call in a UTILITY."""
    _, call_id, method, *rest = _decode(frame)
    return UtilityCall(call_id, method, tuple(rest[0]) if rest else ())


def read_ids(frame: bytes | memoryview) -> list[str]:
    """The request ids of an ABORT."""
    ids: list[str] = _decode(frame)
    return ids


def _lora_name(request: Any) -> str | None:
    """vLLM's LoRARequest, an array that begins with the adapter's name."""
    return request[0] if request else None


def _read_media(feature: Any) -> Media:
    """vLLM's MultiModalFeatureSpec."""
    place = feature["mm_position"]
    return Media(feature["identifier"], place["offset"], place["length"])


def _positions(layouts: dict[str, list[str]], struct: str) -> dict[str, int]:
    return {name: index for index, name in enumerate(layouts.get(struct, ()))}


def _need(positions: dict[str, int], name: str) -> int:
    if name not in positions:
        raise LayoutError(f"the gateway does not say where {name} is; install one kervan version on all nodes")
    return positions[name]
