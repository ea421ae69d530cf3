"""What a model is made of: layers, their matrices, and what each keeps of a sequence.

Shapes are [outputs, inputs], as a checkpoint stores a linear layer. A side that tensor parallelism divides is made of
`Cut`s; a plain number is whole on every GPU.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Part = Literal["attention", "state", "mlp", "experts", "router", "embedding", "head"]
Reach = Literal["full", "sliding", "chunked"]
Arithmetic = Literal["16 bit", "fp8", "fp4"]
KV_BYTES = {"auto": 2.0, "fp8": 1.0, "nvfp4": 0.5 + 1 / 16}  # of a number in the KV cache, by its type


@dataclass(frozen=True, slots=True)
class Cut:
    """A side of a matrix in `count` units of `size` rows or columns. A GPU has its share of units, and at least one."""

    count: int
    size: int = 1


Side = tuple[Cut | int, ...]


def on_gpu(side: Side, tp: int) -> int:
    """Rows or columns of a side on one of `tp` GPUs."""
    return sum(math.ceil(one.count / tp) * one.size if isinstance(one, Cut) else one for one in side)


@dataclass(frozen=True, slots=True)
class Storage:
    """How a matrix is stored: bytes of one weight with its scales, and the type of its arithmetic."""

    bytes_per_weight: float = 2.0
    arithmetic: Arithmetic = "16 bit"


@dataclass(frozen=True, slots=True)
class Weight:
    """One matrix product as the GPU computes it. `modules`: the checkpoint's names of what is joined in it.

    `is_copy`: an earlier layer's matrix, used again (Zamba2): it is computed with, and takes no memory.
    """

    part: Part
    modules: tuple[str, ...]
    outputs: Side
    inputs: Side
    storage: Storage = Storage()
    is_copy: bool = False

    def shape(self, tp: int = 1) -> tuple[int, int]:
        """(outputs, inputs) on one of `tp` GPUs."""
        return on_gpu(self.outputs, tp), on_gpu(self.inputs, tp)

    def size(self, tp: int = 1) -> int:
        """Numbers in it on one of `tp` GPUs."""
        outputs, inputs = self.shape(tp)
        return outputs * inputs

    def size_bytes(self, tp: int = 1) -> float:
        """Bytes that it takes on one of `tp` GPUs."""
        return 0.0 if self.is_copy else self.size(tp) * self.storage.bytes_per_weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Softmax attention with keys and values of its own for each KV head.

    `window`: tokens that a sliding or chunked layer looks back; 0 for full ones. `has_cache` is false where a layer
    reads the keys and values of an earlier one (Gemma 3n).
    """

    reach: Reach
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    weights: tuple[Weight, ...]
    window: int = 0
    has_cache: bool = True

    def kv_bytes(self, tp: int, kv_dtype_bytes: float) -> float:
        """Cache that one token takes on one of `tp` GPUs; a KV head is never cut."""
        if not self.has_cache:
            return 0.0
        return math.ceil(self.num_kv_heads / tp) * (self.head_dim + self.value_dim) * kv_dtype_bytes

    def read_bytes(self, tp: int, kv_dtype_bytes: float) -> float:
        """What attention reads for each token it looks at: a shared cache is read as one of its own."""
        return math.ceil(self.num_kv_heads / tp) * (self.head_dim + self.value_dim) * kv_dtype_bytes

    def score_dims(self, tp: int) -> float:
        """Multiplications for each pair of tokens, halved: heads x head size."""
        return self.num_heads * (self.head_dim + self.value_dim) / 2 / tp


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """Attention over one latent vector for each token (MLA, DeepSeek-V2), which every GPU keeps whole.

    `latent_dims` numbers are kept for each token in the cache's type, or `latent_bytes` bytes where the kernel fixes
    the format. With an indexer, queries look at `selected` tokens of the context, which it chooses among `index_bytes`
    for each. Compressed layers (DeepSeek-V4) keep one such vector for each `tokens_per_vector` tokens, and all vectors
    of the last `window` tokens.
    """

    num_heads: int
    latent_dims: int
    weights: tuple[Weight, ...]
    score_dims_each: int
    latent_bytes: int = 0
    selected: int = 0
    index_bytes: float = 0.0
    index_dims: int = 0
    tokens_per_vector: int = 1
    window: int = 0
    has_context: bool = True

    def vector_bytes(self, kv_dtype_bytes: float) -> float:
        """One latent vector."""
        return self.latent_bytes or self.latent_dims * kv_dtype_bytes

    def kv_bytes(self, tp: int, kv_dtype_bytes: float) -> float:
        """Cache that one token of a long context takes, the indexer's keys with it."""
        if not self.has_context:
            return 0.0
        return (self.vector_bytes(kv_dtype_bytes) + self.index_bytes) / self.tokens_per_vector

    def score_dims(self, tp: int) -> float:
        """Multiplications for each pair of tokens, halved."""
        return self.num_heads * self.score_dims_each / tp


@dataclass(frozen=True, slots=True, kw_only=True)
class StateLayer:
    """Mamba, linear attention or a short convolution: a state for each sequence, whatever its length.

    `conv_channels` x `conv_tail` numbers of the model's type and `state_numbers` of `state_number_bytes`; both are
    divided by tp. `units`: what tp must divide.
    """

    name: str
    weights: tuple[Weight, ...]
    conv_channels: int
    conv_tail: int
    state_numbers: int
    state_number_bytes: float
    units: int

    def state_bytes(self, tp: int = 1) -> float:
        """What one sequence keeps on one of `tp` GPUs."""
        return (self.conv_channels * self.conv_tail * 2.0 + self.state_numbers * self.state_number_bytes) / tp


@dataclass(frozen=True, slots=True, kw_only=True)
class Mlp:
    """A dense MLP: two matrices, or three with a gate."""

    width: int
    matrices: int
    weights: tuple[Weight, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """`count` routed experts of which each token passes `per_token`, and the shared ones (`shared`: 0 or more wide).

    `each`: the matrices of one expert. `weights`: what every token passes: router, shared experts, and projections to
    and from the size that experts work in.
    """

    count: int
    per_token: float
    width: int
    inputs: int
    matrices: int
    shared_width: int
    each: tuple[Weight, ...]
    weights: tuple[Weight, ...]


Mixer = Attention | LatentAttention | StateLayer
FeedForward = Mlp | Experts


@dataclass(frozen=True, slots=True)
class Layer:
    """What a token passes one after the other or side by side. `small`: norms, biases, convolutions: whole, 16 bit."""

    mixers: tuple[Mixer, ...]
    feed_forwards: tuple[FeedForward, ...]
    small: int = 0

    @property
    def weights(self) -> Iterator[Weight]:
        """Matrices that every token passes."""
        for block in (*self.mixers, *self.feed_forwards):
            yield from block.weights

    @property
    def experts(self) -> Experts | None:
        """Its routed experts."""
        return next((one for one in self.feed_forwards if isinstance(one, Experts)), None)

    @property
    def parameters(self) -> int:
        """All of its numbers."""
        routed = sum(e.count * sum(w.size() for w in e.each) for e in self.feed_forwards if isinstance(e, Experts))
        return self.small + sum(weight.size() for weight in self.weights if not weight.is_copy) + routed

    @property
    def active_parameters(self) -> float:
        """Those that one token passes."""
        routed = sum(e.per_token * sum(w.size() for w in e.each) for e in self.feed_forwards if isinstance(e, Experts))
        return self.small + sum(weight.size() for weight in self.weights) + routed

    def weight_bytes(self, tp: int, small_bytes: float, expert_gpus: int = 0) -> float:
        """Bytes on one of `tp` GPUs; whole experts spread over the GPUs take on average the same.

        `expert_gpus`: GPUs that the routed experts are spread over, where they are more than `tp`.
        """
        routed = sum(
            e.count * sum(w.size() / max(tp, expert_gpus) * w.storage.bytes_per_weight for w in e.each)
            for e in self.feed_forwards
            if isinstance(e, Experts)
        )
        return sum(weight.size_bytes(tp) for weight in self.weights) + routed + self.small * small_bytes

    def kv_bytes(self, tp: int, kv_dtype_bytes: float) -> float:
        """Cache that one token takes while it is within all windows; states take nothing for a token more."""
        return sum(one.kv_bytes(tp, kv_dtype_bytes) for one in self.mixers if not isinstance(one, StateLayer))


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a checkpoint's weights are stored: the method's name, and the storage of a quantised matrix and expert.

    `block`: sides of the blocks that share a scale and that tensor parallelism must not cut; (0, 0) without. `kv_cache`
    is the type that the checkpoint gives its KV cache, or "auto".
    """

    method: str
    storage: Storage
    experts: Storage
    block: tuple[int, int] = (0, 0)
    kv_cache: str = "auto"

    @property
    def bytes_per_weight(self) -> float:
        """Of a quantised matrix, scales included."""
        return self.storage.bytes_per_weight


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Architecture facts. Layers of one shape are one object.

    `extra_tables`: what the first stage has beside the table (positions, embeddings for each layer). `tower`:
    parameters of what sees, whole on each GPU of the first stage. `weight_bytes`: of one weight that is not quantised.
    `has_max_model_len`: whether the file says how long a sequence may be; `max_model_len` is a guess where it does not.
    `notes`: sentences on what is not counted, or not as vLLM does.
    """

    source: str
    architecture: str
    is_known: bool
    layers: tuple[Layer, ...]
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    is_tied: bool
    weight_bytes: float
    max_model_len: int
    table: Weight
    head: Weight
    quantization: Quantization | None = None
    extra_tables: tuple[Weight, ...] = ()
    tower: int = 0
    has_max_model_len: bool = True
    notes: tuple[str, ...] = ()

    @property
    def num_layers(self) -> int:
        """Layers, whatever they are made of."""
        return len(self.layers)

    @cached_property
    def distinct(self) -> list[tuple[Layer, int]]:
        """Each shape of layer and how many there are."""
        return count_layers(self.layers)

    @cached_property
    def experts(self) -> Experts | None:
        """The routed experts of the first layer that has any."""
        return next((layer.experts for layer, _ in self.distinct if layer.experts is not None), None)

    @cached_property
    def quantization_name(self) -> str:
        """The checkpoint's quantisation, or the type of its weights."""
        return self.quantization.method if self.quantization else {4.0: "float32", 2.0: "16 bit"}[self.weight_bytes]

    @cached_property
    def parameters(self) -> int:
        """All weights of the language model; biases of linear layers (below 0.5%) and towers are left out."""
        tables = self.table.size() + (0 if self.is_tied else self.head.size())
        layers = sum(count * layer.parameters for layer, count in self.distinct)
        return tables + layers + sum(one.size() for one in self.extra_tables)

    @cached_property
    def active_parameters(self) -> int:
        """Those that one token of text passes, without the embedding table."""
        return round(self.head.size() + sum(count * layer.active_parameters for layer, count in self.distinct))

    @cached_property
    def weights_bytes(self) -> float:
        """Bytes of all weights as they are stored, towers included, on one GPU."""
        tables = self.table.size_bytes() + (0 if self.is_tied else self.head.size_bytes())
        tables += sum(one.size_bytes() for one in self.extra_tables)
        layers = sum(count * layer.weight_bytes(1, self.weight_bytes) for layer, count in self.distinct)
        return tables + layers + self.tower * self.weight_bytes

    @property
    def kv_dtype_bytes(self) -> float:
        """Bytes of a number in the KV cache that vLLM's `auto` gives."""
        return KV_BYTES[self.quantization.kv_cache] if self.quantization is not None else 2.0

    @property
    def kv_bytes_per_token(self) -> float:
        """Cache that one token takes in the whole model, all layers together, while it is within all windows.

        States and layers that read another one's cache take none.
        """
        return self.kv_bytes(1)

    def kv_bytes(self, tp: int, kv_dtype_bytes: float | None = None) -> float:
        """The same on one of `tp` GPUs, in another type."""
        each = self.kv_dtype_bytes if kv_dtype_bytes is None else kv_dtype_bytes
        return sum(count * layer.kv_bytes(tp, each) for layer, count in self.distinct)


def count_layers(layers: tuple[Layer, ...]) -> list[tuple[Layer, int]]:
    """Each shape of layer in these, in the order of the first, and how often it is there."""
    by_id = {id(layer): layer for layer in layers}
    counts = Counter(id(layer) for layer in layers)
    return [(by_id[key], count) for key, count in counts.items()]
