"""Bytes on each GPU: weights, workspace, and what is left for the KV cache."""

import math
from dataclasses import dataclass

from kervan.facts.architecture import LatentAttention, Mlp, ModelSpec, StateLayer
from kervan.facts.architecture.spec import Mixer, count_layers
from kervan.facts.hardware import Gpu
from kervan.facts.layout import Layout, stages
from kervan.sim.limits import BLOCK_TOKENS, EngineLimits

GIB = 2**30
# Beside weights and activations: CUDA's context, cuBLAS and attention workspaces, and captured graphs; NCCL's buffers
# with several GPUs. Fitted on three starts of vLLM 0.24 on H200: benchmarks/records/memory-h200-2026-11-22.jsonl.
CONTEXT_GIB = 0.50
NCCL_GIB = 0.10
# Model runner V1 estimates its CUDA graphs and counts them (0.61 to 0.71 GiB in three starts on H100), and its sampler
# sorts the logits of `max_num_seqs` sequences when it is profiled. Fitted on those three starts:
# benchmarks/records/planner-points-2xh100-2026-11-25.json.
GRAPHS_V1_GIB = 0.65
LOGIT_BYTES = {True: 2 + 4, False: 14.5}  # per sequence and word, by `is_runner_v2`


VOCAB_PADDING = 64  # source: vLLM's VocabParallelEmbedding
MAX_TOKENS = 1 << 50  # of a stage that keeps nothing


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """One GPU of the fullest stage, in GiB, and what its KV cache holds. `kv_tokens` counts a whole replica, the KV
    caches of all its data-parallel ranks.

    `kv_gib` is negative when the model does not fit.
    """

    total_gib: float
    weights_gib: float
    activations_gib: float
    overhead_gib: float
    kv_gib: float
    kv_tokens: int
    kv_bytes_per_token: float

    @property
    def fits(self) -> bool:
        """Whether the KV cache has at least a block."""
        return self.kv_tokens >= BLOCK_TOKENS


def weight_bytes(spec: ModelSpec, layout: Layout, stage: range) -> float:
    """Weights on one GPU of a stage (its layers; the first has the embedding table and towers, the last the head)."""
    total = 0.0
    for layer, count in count_layers(spec.layers[stage.start : stage.stop]):
        total += count * layer.weight_bytes(layout.tp, spec.weight_bytes, layout.gpus_per_stage)
    table = math.ceil(spec.vocab / VOCAB_PADDING) * VOCAB_PADDING / layout.tp * spec.hidden
    is_first, is_last = stage.start == 0, stage.stop == spec.num_layers
    if is_first:
        total += table * spec.table.storage.bytes_per_weight + spec.tower * spec.weight_bytes
        total += sum(one.size_bytes(layout.tp) for one in spec.extra_tables)
    if is_last and not (spec.is_tied and is_first):
        total += table * spec.head.storage.bytes_per_weight
    return total


def activation_bytes(spec: ModelSpec, layout: Layout, limits: EngineLimits, stage: range) -> float:
    """The peak of a step of `max_num_batched_tokens`: the widest MLP beside the residual stream, or the logits."""
    tokens = limits.max_num_batched_tokens
    residual = 3 * tokens * spec.hidden * 2
    dense = [one for layer, _ in spec.distinct for one in layer.feed_forwards if isinstance(one, Mlp)]
    widths = [one.matrices * one.width / layout.tp for one in dense] or [spec.hidden / layout.tp]
    if spec.experts is not None:
        e = spec.experts
        # Two workspaces of the fused kernels: gate and up of all chosen experts, and their outputs. Expert parallel
        # GPUs have whole experts, and room for all tokens: with data-parallel attention for those of all ranks, which
        # vLLM's all-gather brings to each, and profiles so (`AgRsAll2AllManager`, `_allocate_buffers`, 0.24).
        width = e.width / (1 if layout.ep > 1 else layout.tp)
        widths = [layout.attention_dp * e.per_token * (e.matrices * width + e.inputs)]
    peak = residual + tokens * max(widths) * 2
    if stage.stop == spec.num_layers:
        rows = min(limits.max_num_seqs, tokens)
        peak = max(peak, residual / 3 + rows * spec.vocab * LOGIT_BYTES[limits.is_runner_v2])
    return peak


def sequence_bytes(spec: ModelSpec, layout: Layout, limits: EngineLimits, stage: range, length: float) -> float:
    """What a sequence of `length` tokens keeps in the layers of a stage, on one GPU.

    Source: a sliding layer holds `window - 1 + max_num_batched_tokens` tokens at most, and a block (SlidingWindowSpec,
    vLLM 0.24). A chunked one holds as much of its chunk (ChunkedLocalAttentionSpec).
    """
    total = 0.0
    for layer, count in count_layers(spec.layers[stage.start : stage.stop]):
        total += count * sum(_mixer_bytes(one, layout, limits, length) for one in layer.mixers)
    return total


def _mixer_bytes(mixer: Mixer, layout: Layout, limits: EngineLimits, length: float) -> float:
    if isinstance(mixer, StateLayer):
        return mixer.state_bytes(layout.tp)
    each = mixer.kv_bytes(layout.tp, limits.kv_dtype_bytes)
    kept = min(length, mixer.window - 1 + limits.max_num_batched_tokens + BLOCK_TOKENS) if mixer.window else length
    if isinstance(mixer, LatentAttention):  # a window beside vectors of the whole context, where there is one
        near = kept * mixer.vector_bytes(limits.kv_dtype_bytes) if mixer.window else 0.0
        return each * length + near
    return each * kept


def estimate(
    spec: ModelSpec, layout: Layout, gpu: Gpu, limits: EngineLimits, *, context_tokens: float = 0.0
) -> MemoryEstimate:
    """The memory of a replica's fullest GPU.

    `context_tokens`: mean length of a sequence (`max_model_len` without it). It matters where layers keep a window or
    a state: their pool holds sequences, and `kv_tokens` is that number times this length.
    """
    total = gpu.memory_gib
    length = context_tokens or float(limits.max_model_len)
    overhead = CONTEXT_GIB + (NCCL_GIB if layout.gpus_per_replica > 1 else 0.0)
    overhead += 0.0 if limits.is_runner_v2 else GRAPHS_V1_GIB
    estimates = []
    for stage in stages(spec, layout.pp):
        weights = weight_bytes(spec, layout, stage) / GIB
        activations = activation_bytes(spec, layout, limits, stage) / GIB
        pool = total * limits.gpu_memory_utilization - weights - activations - overhead
        per_token = sequence_bytes(spec, layout, limits, stage, length) / length
        if per_token <= 0:  # no layer of the stage keeps anything: another stage decides
            tokens_that_fit = MAX_TOKENS if pool > 0 else 0
            estimates.append(MemoryEstimate(total, weights, activations, overhead, pool, tokens_that_fit, 0.0))
            continue
        tokens = int(max(0.0, pool) * GIB / per_token) // BLOCK_TOKENS * BLOCK_TOKENS * layout.attention_dp
        estimates.append(MemoryEstimate(total, weights, activations, overhead, pool, tokens, per_token))
    return min(estimates, key=lambda memory: (memory.kv_tokens, memory.kv_gib))
