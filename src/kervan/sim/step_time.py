"""How long one engine step takes: the model that planner, simulator and twin share.

A step of a stage is a sum over its layers of matrix products (the slower of reading weights and computing, rounded
where they meet), attention (reading the KV cache of running sequences; computing on prompts), small kernels, and two
all-reduces with several GPUs. A step that no CUDA graph covers cannot be faster than the host launches its kernels.

Sources: Pope et al. 2022 (arXiv 2211.05102) for the terms; the constants are fitted (`constants.py`, `calibration.py`).
"""

import dataclasses
import functools
import math
from dataclasses import dataclass, fields
from typing import NamedTuple

from kervan.facts.architecture import ModelSpec, Part
from kervan.facts.hardware import Gpu
from kervan.facts.layout import Layout, stages
from kervan.sim.collectives import all_reduce_s, send_s
from kervan.sim.constants import Constants
from kervan.sim.limits import MAX_GRAPH_TOKENS, EngineLimits

ROUNDING = 4.0  # exponent of the norm that joins two bounds: 19% above either where they are equal
ACTIVATION_BYTES = 2.0
FULLEST = 0.68  # largest of n normal values over its bound sqrt(2 log n): 0.68 for two, which move against each other
# Passes over the residual stream and the MLP's inner width in a layer: norms, rotary embedding, activation, copies.
RESIDUAL_PASSES, INNER_PASSES = 10.0, 3.0


class Batch(NamedTuple):
    """What a step computes: `sequences` that get one token each and read `context_tokens` in all, and
    `prefill_tokens` of prompts whose attention looks at `prefill_pairs` pairs of tokens. `samples`: tokens drawn.
    """

    sequences: int = 0
    context_tokens: float = 0.0
    prefill_tokens: int = 0
    prefill_pairs: float = 0.0
    samples: int = 0

    @property
    def tokens(self) -> int:
        """All that are computed."""
        return self.sequences + self.prefill_tokens


@dataclass(frozen=True, slots=True)
class Terms:
    """Seconds of a stage's step, by what they are spent on. `host`: waiting for the host to launch kernels."""

    weights: float = 0.0
    compute: float = 0.0
    experts: float = 0.0
    kv_read: float = 0.0
    prefill_attention: float = 0.0
    elementwise: float = 0.0
    kernels: float = 0.0
    all_reduce: float = 0.0
    head: float = 0.0
    overhead: float = 0.0
    host: float = 0.0

    @property
    def total_s(self) -> float:
        """Their sum."""
        return float(sum(getattr(self, field.name) for field in fields(self)))


@dataclass(frozen=True, slots=True)
class _Product:
    """All equal matrix products of a stage."""

    count: int
    weight_bytes: float
    outputs: int
    inputs: int
    peak_flops: float


class StepTime:
    """The step times of one replica."""

    def __init__(
        self,
        spec: ModelSpec,
        layout: Layout,
        gpu: Gpu,
        limits: EngineLimits,
        constants: Constants,
        *,
        network_bytes_s: float = 0.0,
    ) -> None:
        """`network_bytes_s`: between two nodes, when the replica's stages are on several; 0: on one node."""
        self.spec = spec
        self.layout = layout
        self.gpu = gpu
        self.limits = limits
        self.constants = constants
        self.network_bytes_s = network_bytes_s
        # Stages whose layers are of the same kinds take the same time, and are one object.
        kinds: dict[tuple[object, ...], _StageTime] = {}
        self.stages = []
        for layers in stages(spec, layout.pp):
            key = (
                tuple(spec.layers[i] for i in layers),
                sum(spec.has_experts(i) for i in layers),
                layers.stop == spec.num_layers,
            )
            self.stages.append(kinds.setdefault(key, _StageTime(self, layers)))
        self._distinct = list(kinds.values())
        self._kind_of = [self._distinct.index(stage) for stage in self.stages]
        self._counts = [self._kind_of.count(kind) for kind in range(len(self._distinct))]
        self._hand_over_s = functools.lru_cache(maxsize=4096)(self._hand_over)

    def stage_s(self, index: int, batch: Batch) -> float:
        """Seconds that stage `index` is busy with a batch."""
        return self.stages[index].total_s(batch)

    def stages_s(self, batch: Batch) -> list[float]:
        """The same for all stages."""
        if len(self.stages) == 1:
            return [self.stages[0].total_s(batch)]
        times_s = [stage.total_s(batch) for stage in self._distinct]
        return [times_s[kind] for kind in self._kind_of]

    @property
    def is_pipelined(self) -> bool:
        """Stages work on several batches at once. With model runner V1 they take turns, but for parts of prompts."""
        return self.layout.pp > 1 and self.limits.is_runner_v2

    def pass_s(self, batch: Batch) -> tuple[float, float, float]:
        """Of a batch in a pipeline: seconds through all stages and hand-overs, in the slowest stage, in the last."""
        times_s = [stage.total_s(batch) for stage in self._distinct]
        whole_s = sum(count * one_s for count, one_s in zip(self._counts, times_s, strict=True))
        return whole_s + (self.layout.pp - 1) * self.hand_over_s(batch), max(times_s), times_s[-1]

    def context_token_s(self, index: int) -> float:
        """What a stage takes longer for each token of context more."""
        return self.stages[index].context_token_s()

    def terms(self, index: int, batch: Batch) -> Terms:
        """The same by what they are spent on."""
        return self.stages[index].terms(batch)

    def hand_over_s(self, batch: Batch) -> float:
        """From the end of one stage to the start of the next: hidden states and residual (vLLM sends both)."""
        return self._hand_over_s(batch.tokens)

    def _hand_over(self, tokens: int) -> float:
        payload = 2 * tokens * self.spec.hidden * ACTIVATION_BYTES / self.layout.tp
        sent = send_s(self.gpu, payload, network_bytes_s=self.network_bytes_s)
        if self.layout.tp > 1:  # each rank sends its share, and the stage gathers them
            gathered = all_reduce_s(self.gpu, self.layout.tp, payload * self.layout.tp / 2, self.constants.all_reduce_s)
            sent += gathered
        return self.constants.stage_s + sent

    def total_s(self, batch: Batch) -> float:
        """A batch from the first stage to the last, nothing else in the pipeline."""
        return sum(self.stages_s(batch)) + (self.layout.pp - 1) * self.hand_over_s(batch)


class _StageTime:
    def __init__(self, owner: StepTime, layers: range) -> None:
        self.o = owner
        spec, layout = owner.spec, owner.layout
        self.num_layers = len(layers)
        self.is_last = layers.stop == spec.num_layers
        self.num_expert_layers = sum(spec.has_experts(layer) for layer in layers)
        self.full_layers = sum(spec.layers[layer] == "full" for layer in layers)
        self.sliding_layers = sum(spec.layers[layer] == "sliding" for layer in layers)
        dense = self.num_layers - self.num_expert_layers
        self.products = [self._product("attention", nk, self.num_layers) for nk in spec.attention_matrices(layout.tp)]
        if dense:
            self.products += [self._product("mlp", nk, dense) for nk in spec.mlp_shape(spec.intermediate, layout.tp)]
        if self.num_expert_layers and spec.experts is not None:
            e = spec.experts
            self.products.append(self._product("router", (e.count, spec.hidden), self.num_expert_layers))
            if e.shared_width:
                shape = spec.mlp_shape(e.shared_width, layout.tp)
                self.products += [self._product("mlp", nk, self.num_expert_layers) for nk in shape]
        self.head = self._product("head", (math.ceil(spec.vocab / layout.tp), spec.hidden), 1)
        width = spec.intermediate if spec.experts is None else spec.experts.per_token * spec.experts.width
        self.inner = width / layout.tp
        self._linear_s = functools.lru_cache(maxsize=4096)(self._linear)
        self._linear_total_s = functools.lru_cache(maxsize=4096)(lambda tokens: self._linear(tokens).total_s)
        self._head_s = functools.lru_cache(maxsize=2048)(lambda samples: _join(*self._product_s(self.head, samples)))
        kv = spec.kv_bytes_per_token(layout.tp, kv_dtype_bytes=owner.limits.kv_dtype_bytes)
        self._kv_token_s = kv / (owner.gpu.bandwidth_bytes_s * owner.constants.kv_bandwidth_share)
        self._heads_dim = spec.num_heads * (spec.head_dim if spec.mla is None else spec.mla.kv_rank) / layout.tp

    def _product(self, part: Part, shape: tuple[int, int], count: int) -> _Product:
        spec, gpu = self.o.spec, self.o.gpu
        q = spec.quantization
        peak = gpu.bf16_flops
        if q is not None and part not in q.kept:
            peak = (q.computes_fp4 and gpu.fp4_flops) or (q.computes_fp8 and gpu.fp8_flops) or peak
        outputs, inputs = shape
        return _Product(count, outputs * inputs * spec.bytes_per_weight(part), outputs, inputs, peak)

    def _product_s(self, product: _Product, rows: float) -> tuple[float, float]:
        """(seconds bound by memory, seconds bound by arithmetic) of one product of so many rows."""
        c, gpu = self.o.constants, self.o.gpu
        moved = product.weight_bytes + rows * (product.outputs + product.inputs) * ACTIVATION_BYTES
        share = c.flops_share * rows / (rows + c.flops_half_tokens)
        flops = 2 * rows * product.outputs * product.inputs
        return moved / (gpu.bandwidth_bytes_s * c.bandwidth_share), flops / (product.peak_flops * share)

    def _linear(self, tokens: int) -> Terms:
        """What depends on the number of tokens alone."""
        o, c, spec = self.o, self.o.constants, self.o.spec
        weights = compute = 0.0
        for product in self.products:
            memory_s, compute_s = self._product_s(product, tokens)
            both = product.count * _join(memory_s, compute_s)
            if memory_s >= compute_s:
                weights += both
            else:
                compute += both
        residual = tokens * (RESIDUAL_PASSES * spec.hidden + INNER_PASSES * self.inner) * ACTIVATION_BYTES
        message = tokens * spec.hidden * ACTIVATION_BYTES
        reduces = 2 * self.num_layers if o.layout.tp > 1 else 0
        kernels = self.num_layers * c.layer_s + self.num_expert_layers * c.expert_layer_s
        return Terms(
            weights=weights,
            compute=compute,
            experts=self.num_expert_layers * self._experts_s(tokens),
            elementwise=self.num_layers * residual / (o.gpu.bandwidth_bytes_s * c.bandwidth_share),
            kernels=kernels,
            all_reduce=reduces * all_reduce_s(o.gpu, o.layout.tp, message, c.all_reduce_s),
        )

    def _experts_s(self, tokens: int) -> float:
        """The routed experts of one layer: the weights of those that any token chose, and their arithmetic.

        Routing is taken as uniform: E * (1 - (1 - k/E)^T) of E experts are chosen. Their tokens come in tiles; a tile
        costs as much when it is half empty.
        """
        o, c, e = self.o, self.o.constants, self.o.spec.experts
        if e is None or not tokens or not self.num_expert_layers:
            return 0.0
        layout, spec = o.layout, o.spec
        touched = e.count * (1 - (1 - e.per_token / e.count) ** tokens)
        matrices = spec.mlp_matrices * spec.hidden * e.width
        per_gpu = matrices / layout.tp  # with EP whole experts on a share of the GPUs: on average the same
        moved = touched * per_gpu * spec.bytes_per_weight("experts")
        rows_each = tokens * e.per_token / touched
        tile = min(c.expert_tile_tokens, max(16.0, 2 ** math.ceil(math.log2(max(1.0, rows_each)))))
        rows = touched * math.ceil(rows_each / tile) * tile
        memory_s = moved / (o.gpu.bandwidth_bytes_s * c.bandwidth_share)
        # One product sums over the hidden size, the other over the expert's width, cut by tp unless experts are whole.
        width = e.width / (1 if layout.ep > 1 else layout.tp)
        first = (spec.mlp_matrices - 1) / spec.mlp_matrices
        depth = 1 + c.expert_half_depth * (first / spec.hidden + (1 - first) / width)
        compute_s = 2 * rows * per_gpu * depth / (o.gpu.bf16_flops * c.expert_flops_share)
        if layout.ep > 1:  # the fullest GPU decides: of a random choice, the largest of `ep` shares
            largest = FULLEST * math.sqrt(2 * math.log(layout.ep) * (layout.ep - 1))
            memory_s *= 1 + largest * math.sqrt((e.count - touched) / (e.count - 1) / touched)
            compute_s *= 1 + largest / math.sqrt(tokens * e.per_token)
        return _join(memory_s, compute_s)

    def context_token_s(self) -> float:
        """What a step takes longer for each token of context that running sequences read more."""
        return self._kv_token_s * self.full_layers

    def _kv_read_s(self, batch: Batch) -> float:
        read_s = self._kv_token_s * batch.context_tokens * self.full_layers
        if self.sliding_layers:
            window = batch.sequences * float(self.o.spec.window)
            read_s += self._kv_token_s * min(batch.context_tokens, window) * self.sliding_layers
        return read_s

    def _prefill_attention_s(self, batch: Batch) -> float:
        if not batch.prefill_tokens:
            return 0.0
        c = self.o.constants
        length = 2 * batch.prefill_pairs / batch.prefill_tokens
        share = c.attention_share * length / (length + c.attention_half_tokens)
        pairs = batch.prefill_pairs * self.full_layers
        if self.sliding_layers:
            window = batch.prefill_tokens * float(self.o.spec.window)
            pairs += min(batch.prefill_pairs, window) * self.sliding_layers
        return 4 * self._heads_dim * pairs / (self.o.gpu.bf16_flops * share)

    def _overhead_s(self, batch: Batch) -> float:
        c = self.o.constants
        return c.step_s + batch.samples * c.sequence_s if self.is_last else 0.0

    def terms(self, batch: Batch) -> Terms:
        linear = self._linear_s(batch.tokens)
        terms = dataclasses.replace(
            linear,
            kv_read=self._kv_read_s(batch),
            prefill_attention=self._prefill_attention_s(batch),
            head=self._head_s(batch.samples) if self.is_last and batch.samples else 0.0,
            overhead=self._overhead_s(batch),
        )
        return dataclasses.replace(terms, host=max(0.0, self._host_s(batch) - terms.total_s))

    def total_s(self, batch: Batch) -> float:
        busy_s: float = self._linear_total_s(batch.tokens) + self._kv_read_s(batch)
        if self.is_last:
            busy_s += self._overhead_s(batch)
        if batch.prefill_tokens:
            busy_s += self._prefill_attention_s(batch)
        if self.is_last and batch.samples:
            busy_s += self._head_s(batch.samples)
        return busy_s if batch.tokens <= MAX_GRAPH_TOKENS else max(busy_s, self._host_s(batch))

    def _host_s(self, batch: Batch) -> float:
        if batch.tokens <= MAX_GRAPH_TOKENS:
            return 0.0
        c, layout = self.o.constants, self.o.layout
        # Each all-reduce waits for the slowest host of the group.
        each = c.eager_layer_s + c.eager_group_layer_s * math.log2(layout.tp)
        more = c.eager_expert_layer_s + (c.eager_ep_layer_s if layout.ep > 1 else 0.0)
        return self.num_layers * each + self.num_expert_layers * more


def _join(first_s: float, second_s: float) -> float:
    """The larger of two bounds, rounded up where they are close."""
    most = max(first_s, second_s)
    if most <= 0:
        return 0.0
    both: float = most * (1 + (min(first_s, second_s) / most) ** ROUNDING) ** (1 / ROUNDING)
    return both
