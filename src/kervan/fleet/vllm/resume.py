"""Exact resume: a moved stream's generated tokens count as output on its new replica.

A moved request carries its original prompt, and under `wire.GENERATED` in `SamplingParams.extra_args` the tokens that
it has generated. The engine process appends them with vLLM's own `Request.append_output_token_ids` before it queues
the request, which is then in the state of one that vLLM itself has preempted: vLLM computes all its tokens again in one
prefill and goes on. So `max_tokens` and `min_tokens`, stop checks, penalties, block hashes and token positions need
nothing more. What vLLM keeps outside of the request is restored here: the grammar, fed with the generated tokens, and
in `runner_v1` the tokens and the random numbers of model runner V1. No vLLM class is replaced, so a scheduler or a
worker extension of the user's (`scheduler_cls`, `worker_extension_cls`) works as in vLLM.
"""

import copy
import logging
from collections.abc import Sequence
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.utils import check_stop
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

from kervan.errors import EngineError
from kervan.fleet import wire
from kervan.fleet.vllm import versions

logger = logging.getLogger(__name__)

# The first placement has reported the prompt's; all of them go out with the first token.
_PROMPT_RESULTS = ("prompt_logprobs", "prompt_logprob_token_ids", "prompt_logprob_start")


def carrying(params: SamplingParams, generated: Sequence[int]) -> SamplingParams:
    """A copy of `params` that takes `generated` along, for the replica that continues the stream."""
    moved = copy.copy(params)
    for name in _PROMPT_RESULTS:
        if getattr(params, name, None) is not None:
            setattr(moved, name, None)
    moved.extra_args = {**(params.extra_args or {}), wire.GENERATED: list(generated)}
    return moved


def carried(params: SamplingParams | None) -> list[int]:
    """The generated tokens that `params` brought along."""
    extra = params.extra_args if params is not None else None
    tokens: list[int] = (extra or {}).get(wire.GENERATED, [])
    return tokens


def restore(request: Request, structured_output_manager: Any, max_model_len: int) -> None:
    """Put a moved request, which no scheduler knows yet, into the state that it had when it left its last replica.

    Its status is one of vLLM's finished ones if nothing is left to generate. Raises: EngineError when it has more
    tokens than the engine takes.
    """
    generated = carried(request.sampling_params)
    if request.num_prompt_tokens > max_model_len:
        raise EngineError(
            f"request {request.request_id} has a prompt of {request.num_prompt_tokens} tokens, and max_model_len is "
            f"{max_model_len} here; give all replicas of a fleet the same max_model_len"
        )
    if not generated:
        return
    logger.info("stream %s goes on here after %d tokens", request.request_id, len(generated))
    request.append_output_token_ids(generated)
    # It would count the resumed tokens as prompt, which vLLM asserts against when they are in the prefix cache.
    request.prefill_stats = None
    if not check_stop(request, max_model_len) and request.num_tokens >= max_model_len:
        request.status = RequestStatus.FINISHED_LENGTH_CAPPED  # 0.24 lets min_tokens go before it
    if request.structured_output_request is not None and not request.is_finished():
        _advance_grammar(request, generated, structured_output_manager)


def ending(request: Request) -> EngineCoreOutputs:
    """What to answer to a request that `restore` has found finished."""
    output = EngineCoreOutput(
        request_id=request.request_id,
        new_token_ids=[],
        finish_reason=request.get_finished_reason(),
        stop_reason=request.stop_reason,
    )
    return EngineCoreOutputs(outputs=[output], finished_requests={request.request_id})


def _advance_grammar(request: Request, generated: list[int], manager: Any) -> None:
    """Let the grammar count as compiled only when it has taken the generated tokens, in the thread that compiles it."""
    structured = request.structured_output_request
    compiled, advanced = structured._grammar, Future[StructuredOutputGrammar]()
    structured.grammar = advanced
    compiled.add_done_callback(lambda done: advanced.set_result(_advanced(request, generated, manager, done)))


def _advanced(
    request: Request, generated: list[int], manager: Any, compiled: Future[StructuredOutputGrammar]
) -> StructuredOutputGrammar:
    structured = request.structured_output_request
    try:
        grammar = compiled.result()
        # A request of its own, because the real one has all its tokens already; vLLM looks at these attributes only.
        copied = copy.copy(structured)
        copied.grammar = grammar
        replayed = SimpleNamespace(
            request_id=request.request_id,
            use_structured_output=True,
            structured_output_request=copied,
            prompt_token_ids=request.prompt_token_ids,
            all_token_ids=list(request.prompt_token_ids or [0] * request.num_prompt_tokens),
            num_computed_tokens=request.num_prompt_tokens - 1,
            num_output_placeholders=0,
        )
        # Token by token, as it was generated, because a reasoning parser finds the end of reasoning that way.
        for token in generated:
            grammar.is_terminated()  # vLLM asks before each token, and outlines (up to 0.29) counts on it
            replayed.all_token_ids.append(token)
            replayed.num_computed_tokens += 1
            if not versions.advance_grammar(manager, replayed, token):
                raise EngineError(f"its grammar does not take token {token} of its {len(generated)} generated tokens")
        # What vLLM has found out about the reasoning; the grammar is this function's answer.
        vars(structured).update({name: value for name, value in vars(copied).items() if name != "_grammar"})
    except Exception:  # whatever it is, it must end this request only
        logger.exception("request %s cannot be resumed", request.request_id)
        structured.reasoning_ended = True
        return _Refusal()
    return grammar


class _Refusal(StructuredOutputGrammar):  # type: ignore[misc]
    """In the place of a grammar that could not be restored: takes no token, so vLLM ends the request with an error.

    A failed grammar ends only its request since some release after 0.24; there, it ends the engine.
    """

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        return False

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        return []

    def rollback(self, num_tokens: int) -> None:
        pass

    def fill_bitmask(self, bitmask: Any, batch_index: int) -> None:
        pass

    def is_terminated(self) -> bool:
        return True  # so vLLM masks nothing

    def reset(self) -> None:
        pass
