"""The scheduler on paper against vLLM's own: the same requests are in the same steps."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from harness.places import MODELS

from kervan.sim.limits import BLOCK_TOKENS
from kervan.sim.prefix_cache import BlockHashes, CachedRequest, CachingScheduler, PrefixCacheCounts
from kervan.sim.scheduler import ScheduledRequest, Scheduler

BLOCKS, SEQS, BUDGET = 40, 8, 64
BLOCK = BLOCK_TOKENS
ANSWER = 7  # each token of each answer
# A step: tokens by request, in the order of arrival.
Step = dict[int, int]


@dataclass(frozen=True)
class Arrival:
    """A request that comes before step `step`; its number is its place in the list."""

    prompt: list[int]
    output_tokens: int
    step: int = 0
    salt: str | None = None


def vllm_scheduler(*, caches: bool) -> Any:
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
    cache = CacheConfig(block_size=BLOCK, gpu_memory_utilization=0.9, enable_prefix_caching=caches)
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
        log_stats=caches,
    )


def vllm_steps(scheduler: Any, arrivals: Sequence[Arrival]) -> tuple[list[Step], dict[int, int], PrefixCacheCounts]:
    """Its steps, the tokens that each request found in the cache at first, and what it counts of that."""
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

    init_none_hash(sha256)
    hasher = get_request_block_hasher(BLOCK, sha256)
    steps: list[Step] = []
    cached: dict[int, int] = {}
    counts, number, added = PrefixCacheCounts(), 0, 0
    while added < len(arrivals) or scheduler.has_unfinished_requests():
        for arrival in arrivals[added:]:
            if arrival.step <= number:
                scheduler.add_request(
                    Request(
                        request_id=str(added), prompt_token_ids=arrival.prompt, pooling_params=None,
                        sampling_params=SamplingParams(max_tokens=arrival.output_tokens, ignore_eos=True),
                        cache_salt=arrival.salt, block_hasher=hasher,
                    )
                )  # fmt: skip
                added += 1
        number += 1
        if not scheduler.has_unfinished_requests():
            continue
        planned = scheduler.schedule()
        ids = list(planned.num_scheduled_tokens)
        steps.append({int(name): count for name, count in planned.num_scheduled_tokens.items()})
        done = {name: scheduler.requests[name] for name in ids}
        tokens = [[ANSWER] if r.num_computed_tokens >= r.num_tokens else [] for r in done.values()]
        given = scheduler.update_from_output(
            planned,
            ModelRunnerOutput(req_ids=ids, req_id_to_index={n: i for i, n in enumerate(ids)}, sampled_token_ids=tokens),
        )
        for outputs in given.values():
            for output in outputs.outputs:
                if output.prefill_stats is not None:
                    cached[int(output.request_id)] = output.prefill_stats.num_cached_tokens
            if outputs.scheduler_stats is not None:
                found = outputs.scheduler_stats.prefix_cache_stats
                counts.requests += found.requests
                counts.queries += found.queries
                counts.hits += found.hits
    return steps, cached, counts


def our_steps(scheduler: Scheduler[Any], arrivals: Sequence[Arrival]) -> tuple[list[Step], dict[int, int]]:
    """Its steps, and the tokens that each request found in the cache at first."""
    requests: list[Any] = []
    caches = isinstance(scheduler, CachingScheduler)
    steps: list[Step] = []
    number = 0
    chunk: Any = None
    while len(requests) < len(arrivals) or scheduler.waiting or scheduler.num_running:
        for arrival in arrivals[len(requests) :]:
            if arrival.step <= number:
                shape: dict[str, Any] = {
                    "number": len(requests), "context_tokens": len(arrival.prompt),
                    "remaining_tokens": arrival.output_tokens,
                }  # fmt: skip
                if caches:
                    hashes = BlockHashes(arrival.prompt, BLOCK, scope=arrival.salt)
                    requests.append(CachedRequest(**shape, hashes=hashes))
                else:
                    requests.append(ScheduledRequest(**shape))
                scheduler.add(requests[-1])
        number += 1
        if not (scheduler.waiting or scheduler.num_running):
            continue
        before = {request.number: request.computed_tokens for request in requests}
        step = scheduler.compose()
        assert step is not None
        scheduler.check_integrity()
        tokens = {request.number: 1 for request in (*step.group, *step.lasts)}
        for request in [*step.firsts, *([step.chunk] if step.chunk is not None else [])]:
            began_at = before[request.number] if request is chunk else request.cached_tokens
            tokens[request.number] = request.computed_tokens - began_at
        chunk = step.chunk
        steps.append(tokens)
        scheduler.end(step)
        for request in step.group if caches else ():
            request.hashes.append(ANSWER)
    return steps, {request.number: request.first_cached_tokens for request in requests} if caches else {}


@pytest.mark.parametrize("seed", range(20))
def test_the_same_requests_are_in_the_same_steps(seed: int) -> None:
    """Up to 20 requests of up to 260 + 120 tokens in a pool of 640: prompts in parts, a full batch, preemptions."""
    rng = random.Random(seed)
    arrivals = [Arrival([number] * rng.randint(1, 260), rng.randint(1, 120)) for number in range(rng.randint(1, 20))]
    ours: Scheduler[ScheduledRequest] = Scheduler(max_num_seqs=SEQS, max_num_batched_tokens=BUDGET, num_blocks=BLOCKS)
    assert our_steps(ours, arrivals)[0] == vllm_steps(vllm_scheduler(caches=False), arrivals)[0]


def _chats(rng: random.Random) -> list[Arrival]:
    """Requests that begin as others before them: with a system prompt, all of a chat and its answer, or equal ones."""
    systems = [[rng.randrange(10, 99) for _ in range(rng.choice((5, 16, 40, 100)))] for _ in range(2)]
    arrivals: list[Arrival] = []
    step = 0
    for _ in range(rng.randint(5, 40)):
        step += rng.choice((0, 0, 1, 5, 40))
        salt = rng.choice((None, None, None, "tenant"))
        earlier = [one for one in arrivals if one.salt == salt]
        kind = rng.random()
        if earlier and kind < 0.4:
            chat = rng.choice(earlier)
            prompt, answer = chat.prompt, [ANSWER] * chat.output_tokens
        elif earlier and kind < 0.55:
            prompt, answer = rng.choice(earlier).prompt, []
        else:
            prompt, answer = rng.choice(systems), []
        more = [] if earlier and 0.4 <= kind < 0.55 else [rng.randrange(10, 99) for _ in range(rng.randint(1, 60))]
        output_tokens = rng.choice((1, rng.randint(2, 50), rng.randint(2, 120)))
        whole = (prompt + answer + more)[-380:] if rng.random() < 0.1 else (prompt + answer + more)[:380]
        arrivals.append(Arrival(whole, output_tokens, step, salt))
    return arrivals


@pytest.mark.sweep(20)
@pytest.mark.parametrize("seed", range(60))
def test_the_prefix_cache_finds_the_same_tokens(seed: int) -> None:
    """Beside vLLM's, in a pool of 40 blocks: chats, equal prompts in one step, tenants apart, evictions, preemptions."""
    arrivals = _chats(random.Random(seed))
    ours: CachingScheduler[CachedRequest] = CachingScheduler(
        max_num_seqs=SEQS, max_num_batched_tokens=BUDGET, num_blocks=BLOCKS
    )
    steps, cached = our_steps(ours, arrivals)
    expected_steps, expected_cached, expected_counts = vllm_steps(vllm_scheduler(caches=True), arrivals)
    assert steps == expected_steps
    assert cached == expected_cached
    assert ours.counts == expected_counts
