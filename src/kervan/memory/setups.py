"""A decoder and its optimizer as a recipe says, on one rank: what training and measuring run."""

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import psutil
import torch

from kervan.memory import optimizers
from kervan.memory.decoder import Decoder, saving
from kervan.memory.shape import DecoderShape
from kervan.memory.techniques import Recipe
from kervan.ranks.rank import Rank


class Training(Protocol):
    """One recipe, ready to train."""

    def forward(self, tokens: Any, targets: Any) -> Any:
        """The mean loss."""

    def backward(self, loss: Any) -> None:
        """Gradients of it."""

    def step(self) -> None:
        """Change the weights; gradients are dropped."""

    def set_lr(self, lr: float) -> None:
        """Learning rate of the next steps."""

    def weights(self) -> Iterator[Any]:
        """Tensors of weights that this rank keeps."""

    def states(self) -> Iterator[Any]:
        """Tensors of the optimizer that this rank keeps."""

    def gradients(self) -> Iterator[Any]:
        """Tensors of gradients that this rank has after a backward pass."""

    def close(self) -> None:
        """The last call: what would keep its memory from being freed is undone."""


@dataclass
class Plain:
    """One process, or FSDP2 over the ranks."""

    model: Any
    optimizer: optimizers.Optimizer
    recipe: Recipe
    micro_batches: int

    def forward(self, tokens: Any, targets: Any) -> Any:
        with saving(self.model, self.recipe), _autocast(self.recipe, tokens.device):
            return self.model(tokens, targets)

    def backward(self, loss: Any) -> None:
        (loss / self.micro_batches).backward()

    def step(self) -> None:
        self.optimizer.step()

    def set_lr(self, lr: float) -> None:
        self.optimizer.set_lr(lr)

    def weights(self) -> Iterator[Any]:
        yield from (_local(parameter) for parameter in self.model.parameters())

    def states(self) -> Iterator[Any]:
        yield from (_local(tensor) for tensor in self.optimizer.tensors())

    def gradients(self) -> Iterator[Any]:
        yield from (_local(p.grad) for p in self.model.parameters() if p.grad is not None)

    def close(self) -> None:
        """Nothing: what is not referred to is freed."""


def _local(tensor: Any) -> Any:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _autocast(recipe: Recipe, device: Any) -> AbstractContextManager[Any]:
    if recipe.precision != "autocast":
        return nullcontext()
    casting: AbstractContextManager[Any] = torch.autocast(device.type, dtype=torch.bfloat16)
    return casting


def make(shape: DecoderShape, recipe: Recipe, rank: Rank, device: Any, *, lr: float = 3e-4, seed: int = 0,
         micro_batches: int = 1) -> Training:  # fmt: skip
    """Weights are the same for every recipe and number of ranks, as far as its type shows.

    `micro_batches`: backward passes before each step.
    """
    torch.backends.cuda.matmul.allow_tf32 = recipe.precision == "tf32"
    is_wide = recipe.precision in {"fp32", "tf32", "autocast"} or (
        recipe.sharding == "fsdp" and recipe.precision == "bf16"  # the shards are the master weights
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if is_wide else torch.bfloat16)
    try:
        with torch.device(device):
            model = Decoder(shape, recipe)
    finally:
        torch.set_default_dtype(before)
    model.initialise(seed)
    if recipe.sharding == "fsdp":
        return _fsdp(model, recipe, device, lr, micro_batches)
    if recipe.sharding.startswith("zero"):
        from kervan.memory.zero import Zero

        return Zero(model, recipe, rank, device, lr, micro_batches)
    return Plain(model, optimizers.make(recipe, list(model.parameters()), lr), recipe, micro_batches)


def _fsdp(model: Any, recipe: Recipe, device: Any, lr: float, micro_batches: int) -> Plain:
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    has_mixed = recipe.precision == "bf16"
    mixed = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if has_mixed else None, reduce_dtype=torch.float32 if has_mixed else None
    )
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if recipe.has_params_offloaded else OffloadPolicy()
    for layer in model.layers:
        fully_shard(layer, mp_policy=mixed, offload_policy=offload)
    fully_shard(model, mp_policy=mixed, offload_policy=offload)
    return Plain(model, optimizers.make(recipe, list(model.parameters()), lr), recipe, micro_batches)


def sizes(tensors: Iterator[Any]) -> tuple[int, int]:
    """Bytes on the device of torch's GPUs (or of the CPU, if there is none), and in host memory beside it."""
    on_device, on_host, seen = 0, 0, set()
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if (tensor.device, storage.data_ptr()) in seen or not storage.nbytes():
            continue
        seen.add((tensor.device, storage.data_ptr()))
        if tensor.device.type == "cpu":
            on_host += storage.nbytes()
        else:
            on_device += storage.nbytes()
    return on_device, on_host


def clear() -> None:
    """Give back what an earlier recipe has left."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def held_bytes(device: Any) -> int:
    """What cannot be given back now: of a GPU's allocator, or on a CPU of the tensors that Python still knows."""
    clear()
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    # not isinstance: it would ask lazy objects of other packages for their class, and so load them
    found = (one for one in gc.get_objects() if type(one) in PLAIN)
    return sizes(one for one in found if one.device.type == "cpu" and one.layout == torch.strided)[1]


PLAIN = (torch.Tensor, torch.nn.Parameter)  # others, such as DTensor, have one of these inside


def free_bytes(device: Any) -> int:
    """What this process can have in all: what is free, and what its allocator has already."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device))
    return int(psutil.virtual_memory().available)
