"""The scheduler on paper against vLLM's own: the same requests are in the same steps."""

import random
from typing import Any

import pytest
from harness.places import MODELS

from kervan.sim.limits import BLOCK_TOKENS
from kervan.sim.scheduler import ScheduledRequest, Scheduler

BLOCKS, SEQS, BUDGET = 40, 8, 64
BLOCK = BLOCK_TOKENS
# A step: tokens by request, in the order of arrival.
Step = dict[int, int]


def vllm_scheduler() -> Any:
    import torch
    from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig
    from vllm.v1.core.sched.scheduler import Scheduler as VllmScheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    model = ModelConfig(model=str(MODELS / "llama3-8b"), skip_tokenizer_init=True, dtype="float16", max_model_len=512)
    scheduler = SchedulerConfig(
        max_num_seqs=SEQS, max_num_batched_tokens=BUDGET, max_model_len=512, enable_chunked_prefill=True,
        is_encoder_decoder=False, async_scheduling=False,
    )  # fmt: skip
    cache = CacheConfig(block_size=BLOCK, gpu_memory_utilization=0.9, enable_prefix_caching=False)
    cache.num_gpu_blocks = BLOCKS + 1  # one is vLLM's null block
    config = VllmConfig(
        scheduler_config=scheduler, model_config=model, cache_config=cache, device_config=DeviceConfig("cpu")
    )
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    groups = [KVCacheGroupSpec(["layer"], spec)]
    return VllmScheduler(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(num_blocks=BLOCKS + 1, kv_cache_tensors=[], kv_cache_groups=groups),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
        log_stats=False,
    )


def vllm_steps(scheduler: Any, lengths: list[tuple[int, int]]) -> list[Step]:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

    for number, (prompt, output) in enumerate(lengths):
        params = SamplingParams(max_tokens=output, ignore_eos=True)
        scheduler.add_request(
            Request(
                request_id=str(number), prompt_token_ids=[number] * prompt, sampling_params=params, pooling_params=None
            )
        )
    steps = []
    while scheduler.has_unfinished_requests():
        planned = scheduler.schedule()
        ids = list(planned.num_scheduled_tokens)
        steps.append({int(name): count for name, count in planned.num_scheduled_tokens.items()})
        done = {name: scheduler.requests[name] for name in ids}
        tokens = [[7] if r.num_computed_tokens >= r.num_tokens else [] for r in done.values()]
        scheduler.update_from_output(
            planned,
            ModelRunnerOutput(req_ids=ids, req_id_to_index={n: i for i, n in enumerate(ids)}, sampled_token_ids=tokens),
        )
    return steps


def our_steps(lengths: list[tuple[int, int]]) -> list[Step]:
    scheduler: Scheduler[ScheduledRequest] = Scheduler(
        max_num_seqs=SEQS, max_num_batched_tokens=BUDGET, num_blocks=BLOCKS
    )
    requests = [
        ScheduledRequest(number=number, context_tokens=prompt, remaining_tokens=output)
        for number, (prompt, output) in enumerate(lengths)
    ]
    for request in requests:
        scheduler.add(request)
    steps = []
    while scheduler.waiting or scheduler.num_running:
        before = {request.number: request.computed_tokens for request in requests}
        step = scheduler.compose()
        assert step is not None
        prompts = [*step.firsts, *([step.chunk] if step.chunk is not None else [])]
        tokens = {request.number: 1 for request in (*step.group, *step.lasts)}
        for request in prompts:
            has_more = request.computed_tokens > before[request.number]
            tokens[request.number] = request.computed_tokens - (before[request.number] if has_more else 0)
        steps.append(tokens)
        scheduler.end(step)
    return steps


@pytest.mark.parametrize("seed", range(20))
def test_the_same_requests_are_in_the_same_steps(seed: int) -> None:
    """Up to 20 requests of up to 260 + 120 tokens in a pool of 640: prompts in parts, a full batch, preemptions."""
    rng = random.Random(seed)
    lengths = [(rng.randint(1, 260), rng.randint(1, 120)) for _ in range(rng.randint(1, 20))]
    assert our_steps(lengths) == vllm_steps(vllm_scheduler(), lengths)
