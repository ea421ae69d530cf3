"""A training step on paper: what each GPU holds, moment by moment, and the highest sum.

The step is walked as autograd runs `decoder.py`: what each operation keeps for the backward pass, the gradients of
activations that are alive beside it, the parameters' gradients as they come. Tests compare what is kept with the saved
tensors of the real graph, and the peak with the allocator's.

T: tokens of a micro-batch on one GPU (batch x seq). Sizes are of one GPU.
"""

from dataclasses import dataclass
from typing import Any

from kervan.memory.ledger import Ledger, grouped
from kervan.memory.shape import DecoderShape
from kervan.memory.techniques import LOSS_CHUNKS, Recipe

GIB = 2**30
GROUPS = ("weights", "gradients", "optimizer", "activations", "other")
# cuBLAS's workspace on Hopper, and cuBLASLt's (torch.backends.cuda, CUBLAS_WORKSPACE_CONFIG ":4096:2:16:8" and 32 MiB).
CUDA_WORKSPACE_BYTES = 64 * 2**20
MICRO_BATCHES = 2  # of a step, if nobody says otherwise: gradients are mostly accumulated
QUANTISED_BLOCK = 256  # numbers that share a scale of 4 bytes in 8-bit states
# DeepSpeed's buckets as `zero.py` configures them, in numbers.
REDUCE_BUCKET = 100_000_000
PREFETCH_BUCKET = 50_000_000
MAX_LIVE = 200_000_000


@dataclass(frozen=True, slots=True)
class Estimate:
    """One GPU at the moment of the peak, in bytes by group, and the most of each kind ("activations:mlp")."""

    at_peak: dict[str, float]
    most: dict[str, float]
    phase_peaks: dict[str, float]
    peak_phase: str
    host_bytes: float
    kept_bytes: float

    @property
    def total_bytes(self) -> float:
        """The peak."""
        return sum(self.at_peak.values())

    def to_dict(self, *, ranks: int) -> dict[str, Any]:
        """As `--json` prints it."""

        def gib(sizes: dict[str, float]) -> dict[str, float]:
            return {key: round(size / GIB, 6) for key, size in sizes.items()}

        groups = {group: self.at_peak.get(group, 0.0) for group in GROUPS}
        return {
            "gib": gib(groups | {"total": self.total_bytes}),
            "per_gpu": True,
            "ranks": ranks,
            "peak_in": self.peak_phase,
            "most_gib": gib(self.most),
            "phase_peak_gib": gib(self.phase_peaks),
            "kept_for_backward_gib": round(self.kept_bytes / GIB, 6),
            "host_gib": round(self.host_bytes / GIB, 6),
        }


def estimate(
    shape: DecoderShape,
    recipe: Recipe,
    *,
    seq: int,
    batch: int,
    ranks: int = 1,
    micro_batches: int = MICRO_BATCHES,
    on_gpu: bool = True,
) -> Estimate:
    """The peak of a step of micro-batches of `batch` x `seq` tokens on each of `ranks` GPUs.

    With several micro-batches, gradients of the earlier ones are there beside the activations of the next.
    """
    return _Step(shape, recipe, seq, batch, ranks, micro_batches, on_gpu).walk()


@dataclass(frozen=True, slots=True)
class StateBytes:
    """Of one parameter on one GPU. `weights` are those that stay; `host`: what is in host memory."""

    weights: float
    gradients: float
    optimizer: float
    host: float


def state_bytes(recipe: Recipe, ranks: int) -> StateBytes:
    """Bytes of each parameter's states. Source: ZeRO (arXiv 1910.02054, section 3.1): 2 + 2 + 12 in mixed precision."""
    width = {"fp32": 4.0, "tf32": 4.0, "autocast": 4.0, "bf16": 2.0, "bf16-only": 2.0}[recipe.precision]
    moments = {"auto": 4.0 if recipe.precision == "bf16-only" else 8.0, "bf16": 4.0, "8bit": 2 + 8 / QUANTISED_BLOCK}
    states = moments[recipe.states] + (4.0 if recipe.precision == "bf16" else 0.0)
    weights, gradients, optimizer, host = width, width, states, 0.0
    if recipe.sharding == "fsdp":  # the sharded parameters are the master weights
        own = 2.0 if recipe.precision == "bf16-only" else 4.0
        weights, gradients, optimizer = own / ranks, own / ranks, 2 * own / ranks
        if recipe.has_params_offloaded:
            weights, gradients, optimizer, host = 0.0, 0.0, 0.0, weights + gradients + optimizer
        return StateBytes(weights, gradients, optimizer, host)
    if recipe.sharding.startswith("zero"):
        optimizer = (12.0 if recipe.precision == "bf16" else 8.0) / ranks
        gradients = width / ranks if recipe.sharding != "zero1" else width
        weights = width / ranks if recipe.sharding == "zero3" else width
    if recipe.has_optimizer_offloaded:
        host += optimizer + 4.0 / (ranks if recipe.sharding.startswith("zero") else 1)  # FP32 gradients beside them
        optimizer, gradients = 0.0, 0.0
    if recipe.has_params_offloaded:
        host += weights
        weights = 0.0
    return StateBytes(weights, gradients, optimizer, host)


class _Step:
    def __init__(
        self, shape: DecoderShape, recipe: Recipe, seq: int, batch: int, ranks: int, micro_batches: int, on_gpu: bool
    ) -> None:
        self.shape, self.recipe, self.seq, self.batch, self.ranks = shape, recipe, seq, batch, ranks
        self.is_accumulating = micro_batches > 1
        self.on_gpu = on_gpu
        self.tokens = batch * seq
        self.each = state_bytes(recipe, ranks)
        self.c = recipe.compute_bytes  # of a number inside a layer
        self.r = 4 if recipe.precision == "autocast" else self.c  # of one in the residual stream
        self.stream = self.r * self.tokens * shape.hidden
        self.ledger = Ledger()
        self.host_bytes = self.each.host * shape.parameters
        self.offloads = recipe.has_activations_offloaded

    # ---- what a layer keeps

    def layer_kept(self) -> dict[str, float]:
        """Saved tensors of one layer by kind, its input with them."""
        s, c, t = self.shape, self.c, self.tokens
        is_autocast = self.recipe.precision == "autocast"
        normed = c * t * s.hidden
        kept = {
            "residual": 2.0 * self.stream,
            # one copy that all products of it share; autocast converts it for each product anew
            "norm": 2 * 4 * t + (5 if is_autocast else 2) * normed,
            "attention": self._attention_kept(),
            "mlp": 4.0 * c * t * s.intermediate,
        }
        if is_autocast:
            kept["weight copies"] = 2.0 * (s.layer_parameters - 2 * s.hidden)
        return kept

    def _attention_kept(self) -> float:
        """Queries, keys, values, the output, and what the kernel needs beside them."""
        s, c, t = self.shape, self.c, self.tokens
        queries = s.num_heads * s.head_dim * t
        keys = s.num_kv_heads * s.head_dim * t
        if not self._takes_groups():
            keys = queries
        scores = float(self.batch) * s.num_heads * self.seq * self.seq
        if self.recipe.attention == "eager":  # the softmax in FP32, its copy, and the mask
            copy = 2 * scores if c == 2 else 0.0
            return c * (2 * queries + 2 * keys) + 4 * scores + copy + self.seq * self.seq
        if self.recipe.attention == "sdpa-math":  # all of it in FP32; the output is copied for the projection
            return 4 * (queries + 2 * keys) + 4 * scores + c * queries
        return c * (2 * queries + 2 * keys) + 4 * t * s.num_heads

    def _takes_groups(self) -> bool:
        """Whether the kernel reads fewer keys and values than queries; without, they are repeated."""
        s = self.shape
        if s.num_heads == s.num_kv_heads:
            return True
        return (
            self.on_gpu and self.c == 2 and self.recipe.attention in {"sdpa", "sdpa-flash", "sdpa-cudnn", "flash-attn"}
        )

    def selective_kept(self) -> dict[str, float]:
        """What selective checkpointing keeps of a layer: its input, products 1, 3, 5, 7 and attention's output."""
        s, c, t = self.shape, self.c, self.tokens
        kept_products = (s.num_heads + s.num_kv_heads) * s.head_dim + s.intermediate + s.hidden
        attention = s.num_heads * s.head_dim * c * t + 4 * t * s.num_heads
        if self.recipe.attention in {"eager", "sdpa-math", "flash-attn"}:
            attention = 0
        return {"residual": float(self.stream), "products": float(c * t * kept_products), "attention": float(attention)}

    # ---- the walk

    def walk(self) -> Estimate:
        """Forward, backward, optimizer step."""
        ledger, shape = self.ledger, self.shape
        ledger.begin("model")
        ledger.take("weights", self.each.weights * shape.parameters)
        ledger.take("optimizer", self.each.optimizer * shape.parameters)
        if self.on_gpu:
            ledger.take("other:workspace", CUDA_WORKSPACE_BYTES)
        self._take_buffers()
        if self.is_accumulating:
            ledger.take("gradients", self.each.gradients * shape.parameters)
        ledger.begin("forward")
        ledger.take("other:tokens", 2 * 8 * self.tokens)
        self._open_forward()
        self._forward()
        kept = grouped(ledger.now).get("activations", 0.0)
        ledger.begin("backward")
        self._backward()
        self._close_backward()
        ledger.begin("step")
        self._optimizer_step()
        at_peak = grouped(ledger.at_peak)
        if not self.on_gpu and self.host_bytes:  # without a GPU, what is moved to the host has not gone anywhere
            at_peak["other"] = at_peak.get("other", 0.0) + self.host_bytes
        return Estimate(
            at_peak=at_peak, most=dict(ledger.most), phase_peaks=dict(ledger.phase_peaks),
            peak_phase=ledger.peak_phase, host_bytes=self.host_bytes, kept_bytes=kept,
        )  # fmt: skip

    def _keep(self, kinds: dict[str, float], sign: int = 1) -> None:
        for kind, size in kinds.items():
            if self.offloads and kind not in {"weight copies"}:
                self.host_bytes += size if sign > 0 else 0.0
            elif sign > 0:
                self.ledger.take(f"activations:{kind}", size)
            else:
                self.ledger.free(f"activations:{kind}", size)

    def _forward(self) -> None:
        layers = self.shape.num_layers
        for index in range(layers):
            self._gather(self.shape.layer_parameters)
            self._layer_forward(self._kept_of(index))
            self._release(self.shape.layer_parameters)
        self._gather(self.shape.layer_parameters)  # the next one, or in the end the last for its backward pass
        self._keep({"residual": float(self.stream)})  # of the last layer, which the last norm keeps
        self._keep({"norm": 4.0 * self.tokens + self.c * self.tokens * self.shape.hidden})
        self._loss_forward()

    def _kept_of(self, index: int) -> dict[str, float]:
        kind = self.recipe.checkpointing
        if kind == "selective":
            return self.selective_kept()
        if kind == "sequential":
            size = self.shape.num_layers // self.recipe.segments
            last_from = size * (self.recipe.segments - 1)
            if index < last_from:  # one input for each segment
                return {"residual": float(self.stream)} if index % size == 0 else {}
            return self.layer_kept()
        return {"residual": float(self.stream)} if kind == "full" else self.layer_kept()

    def _layer_forward(self, kept: dict[str, float]) -> None:
        """All of a layer is there for a moment at its end: product, its inputs, and the new residual stream."""
        whole = self.layer_kept()
        transient = max(0.0, sum(whole.values()) - sum(kept.values()) if not self.offloads else whole["mlp"])
        if self.recipe.checkpointing in {"full", "sequential"} and kept.keys() != whole.keys():
            # Nothing is kept inside: only what operations hold at once, in the MLP or in attention.
            transient = max(
                self.stream
                + 3.0 * self.c * self.tokens * self.shape.intermediate
                + self.c * self.tokens * self.shape.hidden,
                self.stream + self._attention_forward_bytes(),
            )
        self.ledger.pulse("other:forward", transient + self.stream)
        self._keep(kept)
        if self.recipe.attention in {"eager", "sdpa-math"} and self.recipe.checkpointing == "none":
            self.ledger.pulse("other:forward", self._scores_bytes())

    def _scores_bytes(self) -> float:
        """Beside what eager attention keeps of its scores, what it makes of them on the way."""
        scores = float(self.batch) * self.shape.num_heads * self.seq * self.seq
        return scores * (2 * self.c if self.recipe.attention == "eager" else 4)

    def _attention_forward_bytes(self) -> float:
        s = self.shape
        own = self._attention_kept() + self.c * self.tokens * s.num_heads * s.head_dim
        return own + (self._scores_bytes() if self.recipe.attention in {"eager", "sdpa-math"} else 0.0)

    def _loss_forward(self) -> None:
        t, v = self.tokens, self.shape.vocab
        if self.recipe.precision == "autocast":
            self._keep({"weight copies": 2.0 * self.shape.table_parameters})
        if self.recipe.is_loss_chunked:
            self.ledger.pulse("other:logits", 8.0 * t * v / LOSS_CHUNKS)
            return
        # The logits, their FP32 copy without them, and the log-softmax that is kept: at most two FP32 at once.
        self.ledger.pulse("other:logits", 4.0 * t * v)
        self.ledger.pulse("other:logits", 8.0 * t * v)
        self._keep({"logits": 4.0 * t * v})

    def _backward(self) -> None:
        ledger, s, t = self.ledger, self.shape, self.tokens
        chunk = LOSS_CHUNKS if self.recipe.is_loss_chunked else 1
        logits = 4.0 * t * s.vocab / chunk
        normed = self.c * t * s.hidden
        for index in range(chunk):
            if chunk > 1 or self.offloads:  # recomputed: the log-softmax is there again
                ledger.take("activations:logits", logits)
            ledger.take("other:logits", logits)  # gradient of the picked log-probabilities
            ledger.take("other:logits", logits)  # gradient of the logits
            ledger.free("activations:logits", logits)
            ledger.free("other:logits", logits)
            if self.c == 2:
                ledger.take("other:logits", logits / 2)
                ledger.free("other:logits", logits)
            if chunk == 1:
                self._gradient(s.table_parameters)
            else:
                ledger.pulse("other:gradients", self.each_weight() * s.table_parameters)
                if index == 0:  # the chunks' sum
                    ledger.take("other:gradients", self.each_weight() * s.table_parameters)
            ledger.take("other:gradients of activations", normed / chunk)
            ledger.free("other:logits", logits / 2 if self.c == 2 else logits)
        if chunk > 1:
            ledger.free("other:gradients", self.each_weight() * s.table_parameters)
            self._gradient(s.table_parameters)
        if self.recipe.precision == "autocast":
            ledger.free("activations:weight copies", 2.0 * s.table_parameters)
        self._gradient(s.hidden)
        if self._has_reduce_bucket():  # made when the first gradient is there
            ledger.take("other:buckets", self.each_weight() * REDUCE_BUCKET)
        # the last norm
        ledger.take("other:gradients of activations", self.stream)
        ledger.free("other:gradients of activations", normed)
        if not self.offloads:
            ledger.free("activations:norm", 4.0 * t + normed)
            ledger.free("activations:residual", float(self.stream))
        for index in reversed(range(s.num_layers)):
            self._gather(s.layer_parameters)
            self._layer_backward(index)
            self._release(s.layer_parameters)
        if s.is_tied:  # the table's gradient is made anew and added to the head's
            ledger.pulse("other:gradients", self.each_weight() * s.table_parameters)
        else:
            self._gradient(s.table_parameters)
        ledger.free("other:gradients of activations", self.stream)

    def each_weight(self) -> float:
        """Bytes of a weight, and of its gradient, as the backward pass makes it."""
        return 4.0 if self.recipe.precision in {"fp32", "tf32", "autocast"} else 2.0

    def _layer_backward(self, index: int) -> None:
        ledger, s, t, c = self.ledger, self.shape, self.tokens, self.c
        kept, whole = self._kept_of(index), self.layer_kept()
        if self.recipe.checkpointing == "sequential":
            size = s.num_layers // self.recipe.segments
            is_recomputed = index < size * (self.recipe.segments - 1)
            if is_recomputed and index % size == size - 1:  # all layers of the segment; its input is there
                for kind, size_bytes in whole.items():
                    ledger.take(f"activations:{kind}", size_bytes * size - (self.stream if kind == "residual" else 0))
            kept = whole
        elif self.recipe.checkpointing != "none":
            for kind, size_bytes in whole.items():
                ledger.take(f"activations:{kind}", size_bytes - (0.0 if self.offloads else kept.get(kind, 0.0)))
            kept = whole | {kind: size_bytes for kind, size_bytes in kept.items() if kind not in whole}
        activation = float(c * t * s.intermediate)
        gradient = "other:gradients of activations"
        matrix = s.hidden * s.intermediate
        # down
        ledger.take(gradient, activation)
        self._gradient(matrix)
        self._done(kept, "mlp", activation)
        # their product: the gradients of both factors
        ledger.take(gradient, 2 * activation)
        ledger.free(gradient, activation)
        self._done(kept, "mlp", 2 * activation)
        # up, silu, gate
        ledger.take(gradient, float(c * t * s.hidden))
        self._gradient(matrix)
        ledger.take(gradient, activation)
        ledger.free(gradient, 2 * activation)
        self._done(kept, "mlp", activation)
        ledger.take(gradient, float(c * t * s.hidden))
        self._gradient(matrix)
        ledger.free(gradient, activation + 2.0 * c * t * s.hidden)
        # norm, and the sum with the stream's gradient
        ledger.pulse(gradient, 2.0 * self.stream if self.on_gpu else 3.0 * 4 * t * s.hidden)
        self._done(kept, "norm", kept.get("norm", 0.0) * 0.5)
        self._done(kept, "residual", float(self.stream))
        # attention
        queries = float(c * t * s.num_heads * s.head_dim)
        keys = float(c * t * s.num_kv_heads * s.head_dim)
        self._gradient(s.hidden * s.num_heads * s.head_dim)
        ledger.take(gradient, queries)
        ledger.pulse("other:attention", self._attention_backward_bytes())
        self._done(kept, "attention", kept.get("attention", 0.0))
        ledger.take(gradient, queries + 2 * keys)
        ledger.free(gradient, queries)
        ledger.pulse(gradient, 2 * queries)  # rotation
        ledger.take(gradient, float(c * t * s.hidden))
        self._gradient(s.hidden * (s.num_heads + 2 * s.num_kv_heads) * s.head_dim + 2 * s.hidden)
        ledger.free(gradient, queries + 2 * keys + c * t * s.hidden)
        ledger.pulse(gradient, 2.0 * self.stream if self.on_gpu else 3.0 * 4 * t * s.hidden)
        self._done(kept, "norm", kept.get("norm", 0.0) * 0.5)
        self._done(kept, "residual", float(self.stream))
        for kind in ("products", "weight copies"):
            self._done(kept, kind, kept.get(kind, 0.0))

    def _done(self, kept: dict[str, float], kind: str, size: float) -> None:
        """Saved tensors that an operation has used."""
        if kind not in kept:
            return
        if self.offloads and self.recipe.checkpointing == "none" and kind != "weight copies":
            self.ledger.pulse("other:from host", size)
            return
        self.ledger.free(f"activations:{kind}", size)

    def _attention_backward_bytes(self) -> float:
        """What the backward kernel takes beside its results."""
        s, t = self.shape, self.tokens
        queries = t * s.num_heads * s.head_dim
        scores = float(self.batch) * s.num_heads * self.seq * self.seq
        if self.recipe.attention == "eager":
            return scores * (4 + 4 + self.c) + 3.0 * self.c * queries
        if self.recipe.attention == "sdpa-math":
            return scores * 8 + 12.0 * queries
        # FlashAttention: an FP32 sum for the queries' gradient; repeated keys' gradients before they are added up
        group_copies = 2.0 * self.c * queries if s.num_heads != s.num_kv_heads else 0.0
        return (4.0 * queries if self.on_gpu else 0.0) + group_copies

    # ---- parameters

    def _gradient(self, numbers: float) -> None:
        """Gradients of so many parameters are there."""
        if not numbers:
            return
        full = self.each_weight() * numbers
        share = self.each.gradients * numbers
        if share == full and not self.is_accumulating:
            self.ledger.take("gradients", full)
            return
        self.ledger.pulse("other:gradients", full)  # until it has been added, reduced, or copied to the host
        if not self.is_accumulating:
            self.ledger.take("gradients", share)

    def _gather(self, numbers: int) -> None:
        """FSDP: a layer's whole weights."""
        if self.recipe.sharding == "fsdp":
            self.ledger.take("other:gathered", self.c * numbers)

    def _release(self, numbers: int) -> None:
        if self.recipe.sharding == "fsdp":
            self.ledger.free("other:gathered", self.c * numbers)

    def _take_buffers(self) -> None:
        """What the whole step has, beside states."""
        if self.recipe.sharding == "zero3":
            self.ledger.take("other:buckets", self.each_weight() * REDUCE_BUCKET if self.on_gpu else 0.0)

    def _open_forward(self) -> None:
        s = self.shape
        tables = s.table_parameters * (1 if s.is_tied else 2) + s.hidden
        if self.recipe.sharding == "fsdp":  # the root's own parameters stay gathered to the end of the backward pass
            self.ledger.take("other:gathered", self.c * tables)
        if self.recipe.sharding == "zero3":
            self.ledger.take("other:gathered", self.each_weight() * min(s.parameters, MAX_LIVE + PREFETCH_BUCKET))

    def _has_reduce_bucket(self) -> bool:
        """ZeRO-1 reduces accumulated gradients where they are."""
        return self.recipe.sharding == "zero2" or (self.recipe.sharding == "zero1" and not self.is_accumulating)

    def _close_backward(self) -> None:
        self.ledger.free("other:gathered", self.ledger.now.get("other:gathered", 0.0))
        if self._has_reduce_bucket():
            self.ledger.free("other:buckets", self.each_weight() * REDUCE_BUCKET)

    def _optimizer_step(self) -> None:
        s, recipe = self.shape, self.recipe
        largest = float(max(s.table_parameters, s.hidden * s.intermediate))
        if recipe.sharding.startswith("zero"):
            if not recipe.has_optimizer_offloaded and recipe.precision == "bf16":
                self.ledger.pulse("other:FP32 gradients", 4.0 * s.parameters / self.ranks)
        elif recipe.sharding == "none" and not recipe.has_optimizer_offloaded:
            if recipe.states == "8bit":
                self.ledger.pulse("other:one parameter", 20.0 * largest)
            elif recipe.states == "bf16":
                self.ledger.pulse("other:one parameter", 12.0 * largest)
            elif recipe.precision == "bf16":
                self.ledger.pulse("other:one parameter", 4.0 * largest)
