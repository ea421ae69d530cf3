"""How far vLLM's app is in an answer that can be given again."""

import copy
from collections.abc import AsyncGenerator
from typing import Any

from vllm.outputs import RequestOutput
from vllm.v1.engine.async_llm import AsyncLLM

from kervan.fleet.reconnect.journal import Attempt, current_attempt
from kervan.vendor.vllm_names import CHAT_PATH

BROKEN = ("abort", "error")  # finish reasons of an answer that is not whole, and may go on for a client that comes back


def follow(engine: AsyncLLM) -> None:
    """Let vLLM's app report to each `Attempt` how many tokens it has consumed."""
    generate = engine.generate

    def followed(*args: Any, **kwargs: Any) -> AsyncGenerator[RequestOutput, None]:
        attempt = current_attempt.get()
        outputs: AsyncGenerator[RequestOutput, None] = generate(*args, **kwargs)
        return outputs if attempt is None else _followed(attempt, outputs)

    engine.generate = followed


async def _followed(
    attempt: Attempt, outputs: AsyncGenerator[RequestOutput, None]
) -> AsyncGenerator[RequestOutput, None]:
    # A chat begins with an event of its own for the role, which vLLM writes with the first output, however many tokens
    # that has. An output without tokens before it (as of a prefill in chunks) makes it an event before all tokens.
    is_chat_begun = attempt.journal.path != CHAT_PATH
    try:
        async for output in outputs:
            if not is_chat_begun:
                is_chat_begun = True
                yield _without_tokens(output)
            is_whole = output.finished and all(choice.finish_reason not in BROKEN for choice in output.outputs)
            attempt.take(sum(len(choice.token_ids) for choice in output.outputs), is_finished=is_whole)
            yield output
    finally:
        await outputs.aclose()


def _without_tokens(output: RequestOutput) -> RequestOutput:
    head = copy.copy(output)
    head.finished = False
    head.outputs = [copy.copy(choice) for choice in output.outputs]
    for choice in head.outputs:
        choice.text, choice.token_ids = "", []
        choice.logprobs = None if choice.logprobs is None else []
        choice.finish_reason = choice.stop_reason = None
    return head
