"""AdamW whose states are elsewhere or smaller than torch's own: FP32 masters of BF16 weights, 8 bits, host memory.

They work on one parameter at a time, so that what they need beside the states is the size of the largest one.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from kervan.memory.estimate import QUANTISED_BLOCK
from kervan.memory.techniques import Recipe

BETAS = (0.9, 0.95)
ADAM_EPS = 1e-8
WEIGHT_DECAY = 0.0


class Optimizer(Protocol):
    """What training needs of one."""

    def step(self) -> None:
        """Change the weights, and drop their gradients."""

    def tensors(self) -> Iterator[Any]:
        """Its states."""

    def state_dict(self) -> dict[str, Any]:
        """Its states by name, to be saved."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the states of `state_dict`."""

    def set_lr(self, lr: float) -> None:
        """Learning rate of the next steps."""


def make(recipe: Recipe, parameters: Sequence[Any], lr: float) -> Optimizer:
    """The optimizer of a recipe without DeepSpeed."""
    if recipe.has_optimizer_offloaded:
        return HostAdamW(parameters, lr)
    if recipe.states != "auto":
        return SmallAdamW(
            parameters, lr, bits=8 if recipe.states == "8bit" else 16, has_master=recipe.precision == "bf16"
        )
    if recipe.precision == "bf16" and recipe.sharding == "none":
        return MasterAdamW(parameters, lr)
    return TorchAdamW(parameters, lr)


def _adamw(parameters: Sequence[Any], lr: float) -> Any:
    # fused: one kernel and no temporaries; the default (foreach) takes as much as the weights for a moment
    return torch.optim.AdamW(
        parameters, lr=lr, betas=BETAS, eps=ADAM_EPS, weight_decay=WEIGHT_DECAY, fused=True, foreach=False
    )


class TorchAdamW:
    """torch's own, states in the type of the weights."""

    def __init__(self, parameters: Sequence[Any], lr: float) -> None:
        self._inner = _adamw(list(parameters), lr)

    def step(self) -> None:
        self._inner.step()
        self._inner.zero_grad(set_to_none=True)

    def tensors(self) -> Iterator[Any]:
        for state in self._inner.state.values():
            yield from (value for value in state.values() if torch.is_tensor(value))

    def state_dict(self) -> dict[str, Any]:
        states: dict[str, Any] = self._inner.state_dict()
        return states

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._inner.load_state_dict(state)

    @property
    def inner(self) -> Any:
        """The torch optimizer, for torch.distributed.checkpoint."""
        return self._inner

    def set_lr(self, lr: float) -> None:
        for group in self._inner.param_groups:
            group["lr"] = lr


class MasterAdamW:
    """FP32 copies of BF16 weights, and moments of these."""

    def __init__(self, parameters: Sequence[Any], lr: float) -> None:
        self._parameters = list(parameters)
        self._masters = [parameter.detach().float().requires_grad_() for parameter in self._parameters]
        self._inner = [_adamw([master], lr) for master in self._masters]

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self) -> None:
        for parameter, master, inner in zip(self._parameters, self._masters, self._inner, strict=True):
            if parameter.grad is None:
                continue
            master.grad = parameter.grad.to(master.dtype)
            parameter.grad = None
            inner.step()
            master.grad = None
            parameter.copy_(master)

    def tensors(self) -> Iterator[Any]:
        yield from self._masters
        for inner in self._inner:
            for state in inner.state.values():
                yield from (value for value in state.values() if torch.is_tensor(value))

    def state_dict(self) -> dict[str, Any]:
        """States that do not exist before the first step are made, zero, so that they can be loaded into."""
        for master, inner in zip(self._masters, self._inner, strict=True):
            if not inner.state:
                zero = torch.zeros_like(master, requires_grad=False)
                inner.state[master] = {
                    "step": torch.zeros((), device=master.device), "exp_avg": zero, "exp_avg_sq": zero.clone(),
                }  # fmt: skip
        return {
            f"{index}": {"master": master.detach(), **inner.state[master]}
            for index, (master, inner) in enumerate(zip(self._masters, self._inner, strict=True))
        }

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The tensors of `state_dict`, loaded in place; the weights follow the masters."""
        for index, (parameter, master) in enumerate(zip(self._parameters, self._masters, strict=True)):
            mine = state[f"{index}"]
            master.copy_(mine["master"])
            self._inner[index].state[master] = {name: mine[name] for name in ("step", "exp_avg", "exp_avg_sq")}
            parameter.copy_(master)

    def set_lr(self, lr: float) -> None:
        for inner in self._inner:
            for group in inner.param_groups:
                group["lr"] = lr


class HostAdamW(MasterAdamW):
    """Masters and moments in host memory; a gradient goes there as soon as the backward pass has made it.

    The copy is awaited in `step`, which computes on the host and sends the new weights back.
    """

    def __init__(self, parameters: Sequence[Any], lr: float) -> None:
        self._parameters = list(parameters)
        self._masters = [_host(p.detach()).requires_grad_() for p in self._parameters]
        self._inner = [_adamw([master], lr) for master in self._masters]
        self._gradients = [_host(p.detach()).zero_() for p in self._parameters]
        self._has = [False] * len(self._parameters)
        for index, parameter in enumerate(self._parameters):
            parameter.register_post_accumulate_grad_hook(_taker(self._gradients, self._has, index))

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self) -> None:
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        for index, (parameter, master, inner) in enumerate(
            zip(self._parameters, self._masters, self._inner, strict=True)
        ):
            if not self._has[index]:
                continue
            master.grad = self._gradients[index]
            inner.step()
            master.grad = None
            parameter.copy_(master, non_blocking=True)
            self._has[index] = False

    def tensors(self) -> Iterator[Any]:
        yield from super().tensors()
        yield from self._gradients


def _taker(gradients: list[Any], has: list[bool], index: int) -> Any:
    """A hook of a parameter that takes its gradient.

    It knows no parameter: torch's C++ side holds a parameter's hooks, so Python's garbage collector would not find the
    circle, and the weights would never be freed.
    """

    def take(parameter: Any) -> None:
        if has[index]:  # of an earlier micro-batch
            gradients[index].add_(parameter.grad.to(gradients[index]))
        else:
            # the copy reads the gradient on the current stream, whose later work cannot overwrite it before
            gradients[index].copy_(parameter.grad, non_blocking=True)
        has[index] = True
        parameter.grad = None

    return take


def _host(tensor: Any) -> Any:
    """An FP32 copy in host memory, pinned for a GPU's copies."""
    host = torch.empty(tensor.shape, dtype=torch.float32, pin_memory=tensor.is_cuda)
    return host.copy_(tensor)


class SmallAdamW:
    """Moments in 16 or 8 bits, read to FP32 for the update of one parameter and written back.

    8 bits: blocks of QUANTISED_BLOCK numbers share a scale. The second moment is stored as its root, rounded up, so
    that no divisor becomes zero. The idea of block-wise states is bitsandbytes' (arXiv 2110.02861); the code is not.
    """

    def __init__(self, parameters: Sequence[Any], lr: float, *, bits: int, has_master: bool) -> None:
        self._parameters, self._lr, self._bits, self._steps = list(parameters), lr, bits, 0
        self._masters = [p.detach().float() if has_master else None for p in self._parameters]
        self._moments = [(self._zeros(p, signed=True), self._zeros(p, signed=False)) for p in self._parameters]

    def _zeros(self, parameter: Any, *, signed: bool) -> tuple[Any, ...]:
        if self._bits == 16:
            return (torch.zeros(parameter.shape, dtype=torch.bfloat16, device=parameter.device),)
        blocks = -(-parameter.numel() // QUANTISED_BLOCK)
        kind = torch.int8 if signed else torch.uint8
        return (
            torch.zeros(blocks, QUANTISED_BLOCK, dtype=kind, device=parameter.device),
            torch.zeros(blocks, 1, device=parameter.device),
        )

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self) -> None:
        self._steps += 1
        correct_1, correct_2 = 1 - BETAS[0] ** self._steps, 1 - BETAS[1] ** self._steps
        for parameter, master, (first, second) in zip(self._parameters, self._masters, self._moments, strict=True):
            if parameter.grad is None:
                continue
            gradient = parameter.grad.float()
            parameter.grad = None
            mean = _read(first, gradient, is_root=False).lerp_(gradient, 1 - BETAS[0])
            square = (
                _read(second, gradient, is_root=True).mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            )
            del gradient
            _write(first, mean, is_root=False)
            _write(second, square, is_root=True)
            divisor = square.div_(correct_2).sqrt_().add_(ADAM_EPS)
            target = parameter if master is None else master
            if target.dtype == torch.float32:
                target.addcdiv_(mean, divisor, value=-self._lr / correct_1)
            else:
                target.copy_(target.float().addcdiv_(mean, divisor, value=-self._lr / correct_1))
            if master is not None:
                parameter.copy_(master)

    def tensors(self) -> Iterator[Any]:
        yield from (master for master in self._masters if master is not None)
        for first, second in self._moments:
            yield from (*first, *second)

    def state_dict(self) -> dict[str, Any]:
        states: dict[str, Any] = {"steps": torch.tensor(self._steps)}
        for index, (master, (first, second)) in enumerate(zip(self._masters, self._moments, strict=True)):
            parts = [*first, *second] + ([master] if master is not None else [])
            states |= {f"{index}.{part}": tensor for part, tensor in enumerate(parts)}
        return states

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The tensors of `state_dict`, loaded in place; the weights follow the masters where there are some."""
        self._steps = int(state["steps"])
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            if master is not None:
                parameter.copy_(master)

    def set_lr(self, lr: float) -> None:
        self._lr = lr


def _read(stored: tuple[Any, ...], like: Any, *, is_root: bool) -> Any:
    """FP32 numbers in the shape of `like`, new memory."""
    if len(stored) == 1:
        return stored[0].float()
    codes, scales = stored
    numbers = codes.float().mul_(scales).flatten()[: like.numel()].view(like.shape)
    return numbers.square_() if is_root else numbers


def _write(stored: tuple[Any, ...], numbers: Any, *, is_root: bool) -> None:
    if len(stored) == 1:
        stored[0].copy_(numbers)
        return
    codes, scales = stored
    flat = numbers.flatten()
    if flat.numel() != codes.numel():
        flat = torch.nn.functional.pad(flat, (0, codes.numel() - flat.numel()))
    blocks = flat.view(codes.shape)
    blocks = blocks.sqrt() if is_root else blocks
    most = 255.0 if is_root else 127.0
    torch.div(blocks.abs().amax(1, keepdim=True), most, out=scales)
    scaled = blocks / scales.clamp_min(1e-30)
    codes.copy_(scaled.ceil_().clamp_(0, most) if is_root else scaled.round_().clamp_(-most, most))
