"""The decoder whose memory is measured: Llama's layers in plain torch.

Our own and not transformers' because each tensor that its graph keeps has to be known: `estimate.py` lists them, and
tests compare both. Shapes: [batch, seq, hidden]; inside attention [batch, heads, seq, head_dim].
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

from kervan.memory.shape import DecoderShape
from kervan.memory.techniques import LOSS_CHUNKS, Recipe

EPS = 1e-5
ROPE_BASE = 500_000.0
INIT_STD = 0.02
BACKENDS = {
    "sdpa-math": SDPBackend.MATH,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
}


class _RmsNorm(torch.autograd.Function):  # type: ignore[misc]
    """Keeps what the fused kernel of CUDA keeps, the input and a number for each token.

    On a CPU, torch's own norm is a chain of operations that keeps three FP32 copies of the input.
    """

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any) -> Any:
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)
        ctx.save_for_backward(x, weight, scale)
        return (x.float() * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, weight, scale = ctx.saved_tensors
        normed = x.float() * scale
        grad_normed = grad.float() * weight.float()
        grad_x = scale * (grad_normed - normed * (grad_normed * normed).mean(-1, keepdim=True))
        grad_weight = (grad.float() * normed).flatten(0, -2).sum(0)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


class RmsNorm(nn.Module):  # type: ignore[misc]
    """Root mean square norm over the last side."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))

    def forward(self, x: Any) -> Any:
        weight = self.weight.to(x.dtype)  # under autocast the weight is FP32: a mixed norm would not be fused
        if x.is_cuda:
            return F.rms_norm(x, (x.shape[-1],), weight, EPS)
        return _RmsNorm.apply(x, weight)


def rope(seq: int, head_dim: int, device: Any, dtype: Any) -> tuple[Any, Any]:
    """Cosines and sines, [seq, head_dim] each."""
    steps = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    angles = torch.outer(torch.arange(seq, device=device, dtype=torch.float32), 1.0 / ROPE_BASE**steps)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotated(x: Any, cos: Any, sin: Any) -> Any:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def attend(q: Any, k: Any, v: Any, kind: str) -> Any:
    """Causal attention: [batch, seq, heads x head_dim] of queries and fewer keys and values, by one of ATTENTIONS."""
    group = q.shape[1] // k.shape[1]
    batch, _, seq, _ = q.shape
    if kind == "flash-attn":
        from flash_attn import flash_attn_func

        out = flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=True)
        return out.reshape(batch, seq, -1)
    takes_groups = q.is_cuda and q.dtype != torch.float32 and kind in {"sdpa", "sdpa-flash", "sdpa-cudnn"}
    if group > 1 and not takes_groups:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    if kind == "eager":
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(_causal_mask(seq, q.device), float("-inf"))
        out = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v
    else:
        with sdpa_kernel(_backend(kind, q)):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=group > 1 and takes_groups)
    return out.transpose(1, 2).reshape(batch, seq, -1)


def _backend(kind: str, q: Any) -> Any:
    """Named, so that torch says so where it cannot run and falls back to none. `sdpa`: the fastest for this type."""
    if kind == "sdpa":
        return SDPBackend.EFFICIENT_ATTENTION if q.is_cuda and q.dtype == torch.float32 else SDPBackend.FLASH_ATTENTION
    return BACKENDS[kind]


def _causal_mask(seq: int, device: Any) -> Any:
    return torch.ones(seq, seq, dtype=torch.bool, device=device).triu(1)


class Layer(nn.Module):  # type: ignore[misc]
    """Attention and MLP, each on the normed residual stream."""

    def __init__(self, shape: DecoderShape, attention: str) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        self.attention = attention
        linear = partial(nn.Linear, bias=False)
        self.attention_norm, self.mlp_norm = RmsNorm(shape.hidden), RmsNorm(shape.hidden)
        self.q = linear(shape.hidden, shape.num_heads * shape.head_dim)
        self.k = linear(shape.hidden, shape.num_kv_heads * shape.head_dim)
        self.v = linear(shape.hidden, shape.num_kv_heads * shape.head_dim)
        self.o = linear(shape.num_heads * shape.head_dim, shape.hidden)
        self.gate = linear(shape.hidden, shape.intermediate)
        self.up = linear(shape.hidden, shape.intermediate)
        self.down = linear(shape.intermediate, shape.hidden)

    def forward(self, x: Any) -> Any:
        x = x + self._attention(self.attention_norm(x))
        normed = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))

    def _attention(self, x: Any) -> Any:
        batch, seq, _ = x.shape

        def split(y: Any, heads: int) -> Any:
            return y.view(batch, seq, heads, self.head_dim).transpose(1, 2)

        q, k, v = split(self.q(x), self.heads), split(self.k(x), self.kv_heads), split(self.v(x), self.kv_heads)
        cos, sin = rope(seq, self.head_dim, x.device, q.dtype)
        return self.o(attend(_rotated(q, cos, sin), _rotated(k, cos, sin), v, self.attention))


# torchtitan's choice (torchtitan/distributed/activation_checkpoint.py): attention, and every second matrix product.
def _selective() -> Any:
    mm_count: dict[bool, int] = {True: 0, False: 0}
    attention_ops = {
        getattr(torch.ops.aten, name).default
        for name in (
            "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_flash_attention_for_cpu",
        )
    }  # fmt: skip

    def policy(ctx: Any, op: Any, *_args: Any, **_kwargs: Any) -> Any:
        if op is torch.ops.aten.mm.default:
            mm_count[ctx.is_recompute] += 1
            return CheckpointPolicy.MUST_SAVE if mm_count[ctx.is_recompute] % 2 else CheckpointPolicy.PREFER_RECOMPUTE
        return CheckpointPolicy.MUST_SAVE if op in attention_ops else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


class Decoder(nn.Module):  # type: ignore[misc]
    """Tokens to the mean loss of the next ones."""

    def __init__(self, shape: DecoderShape, recipe: Recipe) -> None:
        super().__init__()
        self.shape, self.recipe = shape, recipe
        self.embed = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape, recipe.attention) for _ in range(shape.num_layers))
        self.norm = RmsNorm(shape.hidden)
        self.head = nn.Linear(shape.hidden, shape.vocab, bias=False)
        if shape.is_tied:
            self.head.weight = self.embed.weight

    def initialise(self, seed: int = 0) -> None:
        """Weights that depend on the seed and each parameter's name alone, not on the order or cut of the model."""
        for name, parameter in self.named_parameters():
            fill(parameter, name, seed)

    def forward(self, tokens: Any, targets: Any) -> Any:
        """The mean cross-entropy of [batch, seq] tokens and the ones that follow."""
        return loss_of(self.head, self.hidden(tokens), targets, is_chunked=self.recipe.is_loss_chunked)

    def hidden(self, tokens: Any) -> Any:
        """[batch, seq, hidden], normed."""
        return self.norm(self._layers(self.embed(tokens)))

    def _layers(self, x: Any) -> Any:
        kind = self.recipe.checkpointing if torch.is_grad_enabled() else "none"
        if kind == "sequential":
            return checkpoint_sequential(list(self.layers), self.recipe.segments, x, use_reentrant=False)
        for layer in self.layers:
            if kind == "none":
                x = layer(x)
            elif kind == "full":
                x = checkpoint(layer, x, use_reentrant=False)
            else:
                x = checkpoint(layer, x, use_reentrant=False, context_fn=_selective)
        return x


def loss_of(head: Callable[[Any], Any], hidden: Any, targets: Any, *, is_chunked: bool = False) -> Any:
    """Mean cross-entropy of the head's logits, in FP32."""
    if not is_chunked:
        return F.cross_entropy(head(hidden).float().flatten(0, -2), targets.flatten())
    total: Any = 0.0
    for part, wanted in zip(
        hidden.flatten(0, -2).tensor_split(LOSS_CHUNKS), targets.flatten().tensor_split(LOSS_CHUNKS), strict=True
    ):
        total = total + checkpoint(partial(_sum_of_losses, head), part, wanted, use_reentrant=False)
    return total / targets.numel()


def _sum_of_losses(head: Callable[[Any], Any], hidden: Any, targets: Any) -> Any:
    return F.cross_entropy(head(hidden).float(), targets, reduction="sum")


def fill(parameter: Any, name: str, seed: int) -> None:
    """A parameter's first values: ones for norms, else normal, the same on each device and for each cut."""
    with torch.no_grad():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
            return
        generator = torch.Generator(device=parameter.device).manual_seed(seed * 1_000_003 + _hash(name))
        parameter.normal_(0.0, INIT_STD, generator=generator)


def _hash(name: str) -> int:
    value = 0
    for byte in name.encode():  # not Python's, which differs from run to run
        value = (value * 257 + byte) % 2_147_483_629
    return value


class _Offloaded:
    """Saved tensors of one forward pass in host memory. Weights are not copied: they stay on the device anyhow."""

    MIN_BYTES = 1 << 16

    def __init__(self, parameters: Iterator[Any]) -> None:
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self._copies: dict[tuple[Any, ...], tuple[Any, Any]] = {}

    def pack(self, tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if tensor.nbytes < self.MIN_BYTES or storage.data_ptr() in self._weights:
            return tensor
        key = (storage._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor._version)
        there = self._copies.get(key)
        if there is not None and not there[0].expired():  # several operations keep the same tensor
            return tensor.device, there[1]
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        host.copy_(tensor, non_blocking=tensor.is_cuda)
        self._copies[key] = StorageWeakRef(storage), host
        return tensor.device, host

    def unpack(self, packed: Any) -> Any:
        self._copies.clear()  # the backward pass has begun; copies live as long as the graph needs them
        if not isinstance(packed, tuple):
            return packed
        device, host = packed
        return host.to(device, non_blocking=True)


def saving(model: Any, recipe: Recipe) -> AbstractContextManager[Any]:
    """Inside, what the backward pass needs is kept where the recipe says."""
    if not recipe.has_activations_offloaded:
        return nullcontext()
    offloaded = _Offloaded(model.parameters())
    hooks: AbstractContextManager[Any] = torch.autograd.graph.saved_tensors_hooks(offloaded.pack, offloaded.unpack)
    return hooks
