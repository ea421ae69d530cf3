"""How long one engine step takes: the model that planner, simulator and twin share.

A step of a stage is a sum over its layers of matrix products (the slower of reading weights and computing, rounded
where they meet), attention (reading the KV cache of running sequences; computing on prompts), small kernels, and two
all-reduces with several GPUs. A step that no CUDA graph covers cannot be faster than the host launches its kernels.

Data-parallel ranks of one replica step together: a layer of experts computes the tokens of all ranks, so the ranks wait
for the one that has most, and one without work computes a dummy batch. A batch is that of the whole replica. It is
dealt out evenly, sequence by sequence and prompt by prompt, as vLLM's load balancer does (the rank with the fewest).
Before and after each layer of experts all tokens go to all ranks and back: an all-gather and a reduce-scatter
(`allgather_reducescatter`, vLLM's default). One rank without CUDA graph leaves all without (`_synchronize_dp_ranks`).

Sources: Pope et al. 2022 (arXiv 2211.05102) for the terms; the constants are fitted (`constants.py`, `calibration.py`).
Rows of products in FP8: `scaled_mm_sm90_fp8_dispatch.cuh` of vLLM, whose tiles they fill.
"""

import dataclasses
import functools
import math
from collections import Counter
from dataclasses import dataclass, fields
from typing import NamedTuple

from kervan.facts.architecture import Attention, Experts, LatentAttention, Layer, ModelSpec, StateLayer, Storage
from kervan.facts.architecture.spec import count_layers
from kervan.facts.hardware import Gpu
from kervan.facts.layout import Layout, stages
from kervan.sim.collectives import all_reduce_s, gather_s, send_s
from kervan.sim.constants import Constants
from kervan.sim.limits import MAX_GRAPH_TOKENS, EngineLimits

ROUNDING = 4.0  # exponent of the norm that joins two bounds: 19% above either where they are equal
ACTIVATION_BYTES = 2.0
FULLEST = 0.68  # largest of n normal values over its bound sqrt(2 log n): 0.68 for two, which move against each other
# Passes over the residual stream and the MLP's inner width in a layer: norms, rotary embedding, activation, copies.
RESIDUAL_PASSES, INNER_PASSES = 10.0, 3.0
# Products in FP8: the most rows that are one tile, of the kernels for few rows; more are cut into pairs of 128, and a
# pair costs as much when it is nearly empty. Only the kernel for the fewest rows reads weights as fast as in 16 bit.
FP8_TILE_ROWS, FP8_PAIR_ROWS = (16, 64, 128), 256
# A number that is sent to the experts' GPUs with its scales, by their arithmetic: vLLM quantises before the all-gather.
SENT_BYTES = {"16 bit": 2.0, "fp8": 1 + 4 / 128, "fp4": 0.5 + 1 / 16}


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
    """Seconds of a stage's step, by what they are spent on. `host`: waiting for the host to launch kernels.
    `exchange`: tokens to the experts of other data-parallel ranks and back.
    """

    weights: float = 0.0
    compute: float = 0.0
    experts: float = 0.0
    kv_read: float = 0.0
    prefill_attention: float = 0.0
    elementwise: float = 0.0
    kernels: float = 0.0
    all_reduce: float = 0.0
    exchange: float = 0.0
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
    is_fp8: bool  # computed so: not on a GPU without FP8 units


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
                tuple(sorted((id(one), count) for one, count in count_layers(spec.layers[layers.start : layers.stop]))),
                layers.stop == spec.num_layers,
            )
            self.stages.append(kinds.setdefault(key, _StageTime(self, layers)))
        self._distinct = list(kinds.values())
        self._kind_of = [self._distinct.index(stage) for stage in self.stages]
        self._counts = [self._kind_of.count(kind) for kind in range(len(self._distinct))]
        self._hand_over_s = functools.lru_cache(maxsize=4096)(self._hand_over)

    @property
    def max_num_seqs(self) -> int:
        """Sequences that a replica runs at once, on all its data-parallel ranks."""
        return self.limits.max_num_seqs * self.layout.attention_dp

    @property
    def max_num_batched_tokens(self) -> int:
        """Tokens that a replica computes in a step, on all its data-parallel ranks."""
        return self.limits.max_num_batched_tokens * self.layout.attention_dp

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
        self.ranks = layout.attention_dp
        self.num_layers = len(layers)
        self.is_last = layers.stop == spec.num_layers
        found = count_layers(spec.layers[layers.start : layers.stop])
        counts: Counter[tuple[tuple[int, int], Storage]] = Counter()
        experts: dict[Experts, int] = {}
        for layer, count in found:
            for weight in layer.weights:
                counts[weight.shape(layout.tp), weight.storage] += count
            if layer.experts is not None:
                experts[layer.experts] = experts.get(layer.experts, 0) + count
        self.products = [self._product(shape, storage, count) for (shape, storage), count in counts.items()]
        self.num_fp8_layers = sum(
            count for layer, count in found if any(_is_fp8(owner.gpu, weight.storage) for weight in layer.weights)
        )
        self.experts = list(experts.items())
        self.num_expert_layers = sum(experts.values())
        self.head = self._product(spec.head.shape(layout.tp), spec.head.storage, 1)
        first = spec.experts
        width = spec.intermediate if first is None else first.per_token * first.width
        self.inner = width / layout.tp
        self._linear_s = functools.lru_cache(maxsize=4096)(self._linear)
        self._linear_total_s = functools.lru_cache(maxsize=4096)(lambda tokens: self._linear(tokens).total_s)
        self._together_s = functools.lru_cache(maxsize=4096)(self._together)
        self._head_s = functools.lru_cache(maxsize=2048)(lambda samples: _join(*self._product_s(self.head, samples)))
        self._read_rows(found)

    def _read_rows(self, found: list[tuple[Layer, int]]) -> None:
        """Sums up what attention reads and computes: over the whole context, over windows, and for each sequence.

        `_context_bytes` are read for each token of context. `_limited`: (tokens that a sequence looks at, bytes of
        each, pairs' multiplications of each). `_state_bytes` are read and written for each sequence.
        """
        tp, kv_dtype_bytes = self.o.layout.tp, self.o.limits.kv_dtype_bytes
        self._context_bytes = self._context_dims = self._state_bytes = 0.0
        limited: dict[float, tuple[float, float]] = {}
        for layer, count in found:
            for mixer in layer.mixers:
                if isinstance(mixer, StateLayer):
                    self._state_bytes += 2 * count * mixer.state_bytes(tp)
                    continue
                most, all_bytes, all_dims, each, dims = _looks_at(mixer, tp, kv_dtype_bytes)
                self._context_bytes += count * all_bytes
                self._context_dims += count * all_dims
                if most:
                    before = limited.get(most, (0.0, 0.0))
                    limited[most] = (before[0] + count * each, before[1] + count * dims)
        self._limited = [(most, each, dims) for most, (each, dims) in limited.items()]
        self._byte_s = 1 / (self.o.gpu.bandwidth_bytes_s * self.o.constants.kv_bandwidth_share)

    def _product(self, shape: tuple[int, int], storage: Storage, count: int) -> _Product:
        gpu, (outputs, inputs) = self.o.gpu, shape
        moved = outputs * inputs * storage.bytes_per_weight
        return _Product(count, moved, outputs, inputs, _peak_flops(gpu, storage), _is_fp8(gpu, storage))

    def _product_s(self, product: _Product, rows: float) -> tuple[float, float]:
        """(seconds bound by memory, seconds bound by arithmetic) of one product of so many rows."""
        c, gpu = self.o.constants, self.o.gpu
        moved = product.weight_bytes + rows * (product.outputs + product.inputs) * ACTIVATION_BYTES
        bandwidth = gpu.bandwidth_bytes_s * c.bandwidth_share
        if product.is_fp8:
            computed, share = _fp8_rows(rows), c.flops_share * c.fp8_flops_factor
            bandwidth *= 1.0 if rows <= FP8_TILE_ROWS[0] else c.fp8_bandwidth_factor
        else:
            computed, share = rows, c.flops_share * rows / (rows + c.flops_half_tokens)
        flops = 2 * computed * product.outputs * product.inputs
        return moved / bandwidth, flops / (product.peak_flops * share)

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
        kernels += self.num_fp8_layers * c.fp8_layer_s
        return Terms(
            weights=weights,
            compute=compute,
            experts=self._all_experts_s(tokens) if self.ranks == 1 else 0.0,
            elementwise=self.num_layers * residual / (o.gpu.bandwidth_bytes_s * c.bandwidth_share),
            kernels=kernels,
            all_reduce=reduces * all_reduce_s(o.gpu, o.layout.tp, message, c.all_reduce_s),
        )

    def _together(self, tokens: int) -> tuple[float, float]:
        """(experts, exchange) of all tokens of all data-parallel ranks."""
        gpu, latency_s = self.o.gpu, self.o.constants.all_reduce_s
        exchange = 0.0
        for e, count in self.experts:
            sent = tokens * e.inputs * SENT_BYTES[e.each[0].storage.arithmetic]
            back = tokens * e.inputs * ACTIVATION_BYTES
            exchange += count * sum(gather_s(gpu, self.ranks, one, latency_s) for one in (sent, back))
        return self._all_experts_s(tokens), exchange

    def _of_fullest_rank(self, batch: Batch) -> Batch:
        """What the rank with most of a replica's batch computes beside the experts."""
        sequences = math.ceil(batch.sequences / self.ranks)
        context = batch.context_tokens * sequences / batch.sequences if batch.sequences else 0.0
        prompts = max(1, batch.samples - batch.sequences)  # one that is computed in part alone counts as one
        share = math.ceil(prompts / self.ranks) / prompts
        prefill = math.ceil(batch.prefill_tokens * share)
        return Batch(
            sequences,
            context,
            prefill,
            batch.prefill_pairs * share,
            sequences + math.ceil((batch.samples - batch.sequences) / self.ranks),
        )

    def _all_experts_s(self, tokens: int) -> float:
        return sum(count * self._experts_s(one, tokens) for one, count in self.experts)

    def _experts_s(self, e: Experts, tokens: int) -> float:
        """The routed experts of one layer: the weights of those that any token chose, and their arithmetic.

        Routing is taken as uniform: E * (1 - (1 - k/E)^T) of E experts are chosen. Their tokens come in tiles; a tile
        costs as much when it is half empty.
        """
        o, c, layout = self.o, self.o.constants, self.o.layout
        if not tokens:
            return 0.0
        touched = e.count * (1 - (1 - e.per_token / e.count) ** tokens)
        matrices = e.matrices * e.inputs * e.width
        per_gpu = matrices / layout.gpus_per_stage  # with EP whole experts on a share of the GPUs: on average the same
        moved = touched * per_gpu * e.each[0].storage.bytes_per_weight
        rows_each = tokens * e.per_token / touched
        tile = min(c.expert_tile_tokens, max(16.0, 2 ** math.ceil(math.log2(max(1.0, rows_each)))))
        rows = touched * math.ceil(rows_each / tile) * tile
        memory_s = moved / (o.gpu.bandwidth_bytes_s * c.bandwidth_share)
        # One product sums over the hidden size, the other over the expert's width, cut by tp unless experts are whole.
        width = e.width / (1 if layout.ep > 1 else layout.tp)
        first = (e.matrices - 1) / e.matrices
        depth = 1 + c.expert_half_depth * (first / e.inputs + (1 - first) / width)
        compute_s = 2 * rows * per_gpu * depth / (_peak_flops(o.gpu, e.each[0].storage) * c.expert_flops_share)
        if layout.ep > 1:  # the fullest GPU decides: of a random choice, the largest of `ep` shares
            largest = FULLEST * math.sqrt(2 * math.log(layout.ep) * (layout.ep - 1))
            memory_s *= 1 + largest * math.sqrt((e.count - touched) / (e.count - 1) / touched)
            compute_s *= 1 + largest / math.sqrt(tokens * e.per_token)
        return _join(memory_s, compute_s)

    def context_token_s(self) -> float:
        """What a step takes longer for each token of context that running sequences read more."""
        return self._byte_s * self._context_bytes / self.ranks

    def _kv_read_s(self, batch: Batch) -> float:
        read = self._context_bytes * batch.context_tokens + self._state_bytes * batch.sequences
        for most, each, _ in self._limited:
            read += each * min(batch.context_tokens, batch.sequences * most)
        return self._byte_s * read

    def _prefill_attention_s(self, batch: Batch) -> float:
        if not batch.prefill_tokens:
            return 0.0
        c = self.o.constants
        length = 2 * batch.prefill_pairs / batch.prefill_tokens
        share = c.attention_share * length / (length + c.attention_half_tokens)
        work = batch.prefill_pairs * self._context_dims
        for most, _, dims in self._limited:
            work += min(batch.prefill_pairs, batch.prefill_tokens * most) * dims
        return 4 * work / (self.o.gpu.bf16_flops * share)

    def _overhead_s(self, batch: Batch) -> float:
        c = self.o.constants
        return c.step_s + batch.samples * c.sequence_s if self.is_last else 0.0

    def terms(self, batch: Batch) -> Terms:
        together = (0.0, 0.0)
        if self.ranks > 1:
            together = self._together_s(batch.tokens)
            batch = self._of_fullest_rank(batch)
        linear = self._linear_s(batch.tokens)
        if self.ranks > 1:
            linear = dataclasses.replace(linear, experts=together[0], exchange=together[1])
        terms = dataclasses.replace(
            linear,
            kv_read=self._kv_read_s(batch),
            prefill_attention=self._prefill_attention_s(batch),
            head=self._head_s(batch.samples) if self.is_last and batch.samples else 0.0,
            overhead=self._overhead_s(batch),
        )
        return dataclasses.replace(terms, host=max(0.0, self._host_s(batch) - terms.total_s))

    def total_s(self, batch: Batch) -> float:
        together_s = 0.0
        if self.ranks > 1:
            together_s = sum(self._together_s(batch.tokens))
            batch = self._of_fullest_rank(batch)
        busy_s: float = self._linear_total_s(batch.tokens) + self._kv_read_s(batch) + together_s
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


def _peak_flops(gpu: Gpu, storage: Storage) -> float:
    """The GPU's rate for the type that weights so stored are computed in; of 16 bit where it has none for that type."""
    rates = {"fp8": gpu.fp8_flops, "fp4": gpu.fp4_flops}
    return rates.get(storage.arithmetic, 0.0) or gpu.bf16_flops


def _is_fp8(gpu: Gpu, storage: Storage) -> bool:
    return storage.arithmetic == "fp8" and gpu.fp8_flops > 0


def _fp8_rows(rows: float) -> float:
    """So many rows as a product in FP8 computes."""
    one = next((most for most in FP8_TILE_ROWS if rows <= most), None)
    return FP8_PAIR_ROWS * math.ceil(rows / FP8_PAIR_ROWS) if one is None else one


def _join(first_s: float, second_s: float) -> float:
    """The larger of two bounds, rounded up where they are close."""
    most = max(first_s, second_s)
    if most <= 0:
        return 0.0
    both: float = most * (1 + (min(first_s, second_s) / most) ** ROUNDING) ** (1 / ROUNDING)
    return both


def _looks_at(
    mixer: Attention | LatentAttention, tp: int, kv_dtype_bytes: float
) -> tuple[float, float, float, float, float]:
    """Of one layer: the most tokens that a query looks at (0: all); bytes and multiplications for each token of the
    whole context; and those for each of the tokens that it looks at.
    """
    dims = mixer.score_dims(tp)
    if isinstance(mixer, Attention):
        each = mixer.read_bytes(tp, kv_dtype_bytes)
        return (0.0, each, dims, 0.0, 0.0) if mixer.reach == "full" else (float(mixer.window), 0.0, 0.0, each, dims)
    vector = mixer.vector_bytes(kv_dtype_bytes)
    if not (mixer.selected or mixer.window or mixer.tokens_per_vector > 1):
        return 0.0, vector, dims, 0.0, 0.0
    # An indexer reads all of its keys, with half the arithmetic (a score, no values); attention what it chose.
    all_bytes = mixer.index_bytes / mixer.tokens_per_vector
    all_dims = mixer.index_dims / 2 / mixer.tokens_per_vector
    if not mixer.selected and mixer.has_context:
        all_bytes += vector / mixer.tokens_per_vector
        all_dims += dims / mixer.tokens_per_vector
    return float(mixer.selected + mixer.window), all_bytes, all_dims, vector, dims
