"""Resume in model runner V1 (CPU, and some models on GPUs): its workers keep tokens and random numbers of their own.

Model runner V2 needs nothing: it takes generated tokens from vLLM's scheduler with each request that is new to it, and
draws its random numbers from the seed and the token's position.
"""

from collections.abc import Callable
from typing import Any

import torch

from kervan.fleet.vllm.resume import carried


def install(worker: Any) -> bool:
    """Make a worker's model runner V1 resume moved requests; whether it is one. Runs in each worker, once."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    runner = worker.model_runner
    if not isinstance(runner, GPUModelRunner):
        return False
    if runner.is_pooling_model:
        return True
    batch = runner.input_batch
    batch.add_request = _resuming(batch.add_request, _Draws(runner))
    return True


class _Draws:
    """Takes from a generator as many random numbers as V1's sampler takes for a token."""

    def __init__(self, runner: Any):
        self._sample = runner.sampler.topk_topp_sampler.forward
        self._device = runner.device
        self._width = runner.input_batch.vocab_size
        if self.is_cpu and self._state_after(1) == self._state_after(self._width):
            self._width = 1  # one number per token, not one for each entry of the vocabulary

    @property
    def is_cpu(self) -> bool:
        return bool(self._device.type == "cpu")

    def skip(self, generator: torch.Generator, num_tokens: int) -> None:
        if not num_tokens:
            return
        if self.is_cpu:
            for _ in range(num_tokens):
                self._draw(generator, self._width)
            return
        before = generator.get_offset()
        self._draw(generator, self._width)
        generator.set_offset(before + num_tokens * (generator.get_offset() - before))

    def _draw(self, generator: torch.Generator, width: int) -> None:
        self._sample(torch.zeros(1, width, device=self._device), {0: generator}, None, None)

    def _state_after(self, width: int) -> list[int]:
        generator = torch.Generator(device=self._device)
        generator.manual_seed(0)
        self._draw(generator, width)
        state: list[int] = generator.get_state().tolist()
        return state


class _CpuGenerator(torch.Generator):  # type: ignore[misc]
    """A CPU generator that can take back what was drawn for a token that vLLM then discards.

    vLLM samples after each chunk of a prefill, discards what is not the last, and sets the generator's offset back.
    torch's CPU generators have no offset, and the exception would end the engine.
    """

    state: Any
    draws: _Draws

    def get_offset(self) -> int:
        return 0

    def set_offset(self, offset: int) -> None:
        self.manual_seed(self.initial_seed())
        self.draws.skip(self, len(self.state.output_token_ids))


def _resuming(add_request: Callable[[Any], int], draws: _Draws) -> Callable[[Any], int]:
    def add(state: Any) -> int:
        generated = carried(state.sampling_params)
        # A request that vLLM has preempted comes again, with its tokens.
        is_resumed = bool(generated) and not state.output_token_ids
        if is_resumed:
            state.output_token_ids.extend(generated)
        generator = state.generator
        if generator is not None:
            if draws.is_cpu and not isinstance(generator, _CpuGenerator):
                replacing = _CpuGenerator(device="cpu")
                replacing.manual_seed(generator.initial_seed())
                replacing.state, replacing.draws = state, draws
                state.generator = replacing
            if is_resumed:
                draws.skip(state.generator, len(generated))
        return add_request(state)

    return add
