"""vLLM requests and outputs as frames."""

import time
from collections.abc import Sequence
from typing import Any

import msgspec
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine import (
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    EngineCoreRequestType,
    FinishReason,
    UtilityOutput,
)
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from kervan.fleet.stream import Stream
from kervan.fleet.vllm import resume, versions
from kervan.policy.prefix import PromptContent


class VllmCodec:
    """Implements `kervan.fleet.codec.Codec` for one vLLM version."""

    def __init__(self) -> None:
        self.engine_version = versions.engine_version()
        self.layouts = {
            struct.__name__: list(struct.__struct_fields__)
            for struct in (EngineCoreRequest, EngineCoreOutput, EngineCoreOutputs, UtilityOutput)
        }
        self._encoder = MsgpackEncoder()
        self._decoder = MsgpackDecoder(EngineCoreOutputs)

    def check(self, request: EngineCoreRequest) -> None:
        """Refuse what has no encoding as vLLM refuses parameters. For the time before anything counts the request."""
        try:
            self._encoder.encode(request)
        except (ValueError, OverflowError, RecursionError) as error:
            raise VLLMValidationError(f"the request cannot be sent to an engine: {error}") from error

    def describe(self, request: EngineCoreRequest) -> Stream:
        sampling = request.sampling_params
        return Stream(
            request_id=request.request_id,
            request=request,
            prompt_tokens=len(request.prompt_token_ids or ()),
            max_output_tokens=(sampling.max_tokens or 0) if sampling is not None else 0,
            is_movable=not request.resumable,  # a streaming input lives in its replica
            model="" if request.lora_request is None else request.lora_request.lora_name,
        )

    def prompt(self, stream: Stream) -> PromptContent | None:
        request: EngineCoreRequest = stream.request
        params = request.sampling_params or request.pooling_params
        if request.prompt_token_ids is None or request.prompt_embeds is not None or request.resumable:
            return None
        if params is not None and params.skip_reading_prefix_cache:  # its prompt's logprobs are wanted
            return None
        lora = request.lora_request
        scope = ("", "") if lora is None else (lora.lora_name, lora.lora_path)
        items = [(item.mm_position.offset, item.identifier) for item in request.mm_features or ()]
        return PromptContent(request.prompt_token_ids, (*scope, request.cache_salt or ""), tuple(sorted(items)))

    def cached_tokens(self, output: EngineCoreOutput) -> int | None:
        return None if output.prefill_stats is None else int(output.prefill_stats.num_local_cached_tokens)

    def queue_s(self, output: EngineCoreOutput) -> float | None:
        times_s = {event.type: event.timestamp for event in output.events or ()}
        queued_s = times_s.get(EngineCoreEventType.QUEUED)
        scheduled_s = times_s.get(EngineCoreEventType.SCHEDULED)
        return None if queued_s is None or scheduled_s is None else max(0.0, scheduled_s - queued_s)

    def encode_add(self, stream: Stream) -> Sequence[Any]:
        request = stream.request if stream.epoch == 0 else self._moved(stream)
        return EngineCoreRequestType.ADD.value, *self._encoder.encode(request)

    @staticmethod
    def _moved(stream: Stream) -> EngineCoreRequest:
        changes: dict[str, Any] = {"request_id": stream.wire_id}
        if stream.generated and stream.request.sampling_params is not None:
            changes["sampling_params"] = resume.carrying(stream.request.sampling_params, stream.generated)
        return msgspec.structs.replace(stream.request, **changes)

    def encode_abort(self, wire_ids: list[str]) -> Sequence[Any]:
        return EngineCoreRequestType.ABORT.value, *self._encoder.encode(wire_ids)

    def encode_utility(self, call_id: int, method: str, args: tuple[Any, ...]) -> Sequence[Any]:
        # The replica fills in the session's index.
        return EngineCoreRequestType.UTILITY.value, *self._encoder.encode((0, call_id, method, args))

    def decode(self, frames: Sequence[Any]) -> EngineCoreOutputs:
        return self._decoder.decode(frames)

    def restore(self, output: EngineCoreOutput, stream: Stream) -> None:
        output.request_id = stream.request_id
        output.prefill_stats = None  # the first placement has reported the prompt already

    def finish(self, output: EngineCoreOutput, stream: Stream) -> None:
        if output.trace_headers is None:  # vLLM's span of the request would have no parent; a twin does not know them
            output.trace_headers = stream.request.trace_headers

    def failure(self, request_id: str) -> EngineCoreOutputs:
        failed = EngineCoreOutput(request_id=request_id, new_token_ids=[], finish_reason=FinishReason.ERROR)
        return EngineCoreOutputs(outputs=[failed], finished_requests={request_id})

    def record(self, output: EngineCoreOutput) -> bytes:
        request_id, output.request_id = output.request_id, ""
        frames = self._encoder.encode(EngineCoreOutputs(outputs=[output]))
        output.request_id = request_id
        return msgspec.msgpack.encode([bytes(frame) for frame in frames])

    def recorded(self, data: bytes, request_id: str) -> EngineCoreOutputs:
        outputs = self._decoder.decode(msgspec.msgpack.decode(data, type=list[bytes]))
        outputs.timestamp = time.monotonic()
        for output in outputs.outputs:
            output.request_id = request_id
            for event in output.events or ():
                event.timestamp = outputs.timestamp  # that of another machine would be compared with this one's
        return outputs
