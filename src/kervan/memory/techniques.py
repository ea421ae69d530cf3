"""Techniques that change what a training step takes, their names on the command line, and which go together."""

from dataclasses import dataclass, replace
from typing import Any, Final, Literal, get_args

from kervan.errors import ConfigError

Precision = Literal["fp32", "tf32", "autocast", "bf16", "bf16-only"]
Attention = Literal["sdpa", "eager", "sdpa-math", "sdpa-efficient", "sdpa-flash", "sdpa-cudnn", "flash-attn"]
Checkpointing = Literal["none", "full", "selective", "sequential"]
States = Literal["auto", "bf16", "8bit"]
Sharding = Literal["none", "fsdp", "zero1", "zero2", "zero3"]

PRECISIONS: Final = get_args(Precision)
ATTENTIONS: Final = get_args(Attention)
SHARDINGS: Final = tuple(one for one in get_args(Sharding) if one != "none")

# Every name that `--technique` takes, and what it means; docs/memory.md and the help show them.
NAMES: Final[dict[str, str]] = {
    "fp32": "weights, gradients, moments and arithmetic in FP32; the default",
    "tf32": "the same, matrix products in TF32",
    "autocast": "FP32 weights, gradients and moments; torch.autocast computes in BF16",
    "bf16": "BF16 weights and gradients; the optimizer keeps FP32 master weights and moments",
    "bf16-only": "BF16 weights, gradients and moments, no master weights",
    "checkpoint": "recompute each layer in the backward pass",
    "checkpoint-selective": "recompute a layer without its attention and every second matrix product",
    "checkpoint-sequential=K": "checkpoint_sequential in K segments; its last segment is never recomputed",
    "eager": "attention as separate operations, as before FlashAttention; needs memory for seq x seq",
    "sdpa-math": "torch's attention, its math backend",
    "sdpa-efficient": "torch's attention, its memory-efficient backend",
    "sdpa-flash": "torch's attention, its FlashAttention backend",
    "sdpa-cudnn": "torch's attention, its cuDNN backend",
    "flash-attn": "attention by the flash-attn package",
    "chunked-loss": "logits and loss for 1/8 of the tokens at a time, recomputed in the backward pass",
    "bf16-states": "the optimizer's moments in BF16",
    "8bit-states": "the optimizer's moments in 8 bits, with a scale for each 256",
    "fsdp": "FSDP2 (fully_shard) over the ranks",
    "zero1": "DeepSpeed ZeRO-1: optimizer states over the ranks",
    "zero2": "DeepSpeed ZeRO-2: gradients as well",
    "zero3": "DeepSpeed ZeRO-3: weights as well",
    "offload-optimizer": "optimizer states, and each gradient when it is there, in host memory",
    "offload-params": "weights in host memory (fsdp and zero3)",
    "offload-activations": "what the backward pass needs in host memory",
}
LOSS_CHUNKS: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Techniques that are used together. `segments`: of `checkpoint_sequential`."""

    precision: Precision = "fp32"
    attention: Attention = "sdpa"
    checkpointing: Checkpointing = "none"
    segments: int = 0
    states: States = "auto"
    sharding: Sharding = "none"
    is_loss_chunked: bool = False
    has_optimizer_offloaded: bool = False
    has_params_offloaded: bool = False
    has_activations_offloaded: bool = False

    def __post_init__(self) -> None:
        """Raises: ConfigError for techniques that exclude each other."""
        is_zero = self.sharding.startswith("zero")
        if is_zero and self.precision not in {"bf16", "fp32", "tf32"}:
            raise ConfigError(
                f"{self.sharding} with {self.precision}: DeepSpeed keeps FP32 states of BF16 weights, or all in FP32; "
                f"write {self.sharding},bf16"
            )
        if self.sharding != "none" and self.states != "auto":
            raise ConfigError(
                f"{self.states}-states with {self.sharding}: these moments are kervan's own optimizer's, which "
                "does not "
                "shard; leave one of the two out"
            )
        if self.has_params_offloaded and self.sharding not in {"fsdp", "zero3"}:
            raise ConfigError("offload-params needs weights that are gathered when they are used; add fsdp or zero3")
        if self.has_optimizer_offloaded and self.sharding == "fsdp":
            raise ConfigError(
                "offload-optimizer with fsdp: FSDP2 offloads weights, gradients and states together; write "
                "fsdp,offload-params"
            )
        if self.has_optimizer_offloaded and self.states != "auto":
            raise ConfigError(
                f"offload-optimizer with {self.states}-states: in host memory the states are FP32; leave one "
                "of the two "
                "out"
            )
        if self.has_optimizer_offloaded and self.sharding == "none" and self.precision == "bf16-only":
            raise ConfigError("offload-optimizer with bf16-only: states in host memory are FP32; write bf16")
        if self.has_activations_offloaded and self.checkpointing in {"selective", "sequential"}:
            raise ConfigError(
                f"offload-activations with checkpoint-{self.checkpointing}: use it alone, or with checkpoint"
            )
        if self.has_activations_offloaded and self.sharding in {"fsdp", "zero3"}:
            raise ConfigError(
                f"offload-activations with {self.sharding}: gathered weights would be copied to the host as "
                "well; leave "
                "one of the two out"
            )
        if self.attention in {"sdpa-flash", "sdpa-cudnn", "flash-attn"} and self.precision in {"fp32", "tf32"}:
            raise ConfigError(
                f"{self.attention} with {self.precision}: these kernels take 16-bit numbers; add bf16, or use "
                "sdpa-efficient"
            )

    @property
    def compute_bytes(self) -> int:
        """Of a number in the layers' arithmetic."""
        return 4 if self.precision in {"fp32", "tf32"} else 2

    @property
    def text(self) -> str:
        """The names, in the order of NAMES."""
        words: list[str] = [self.precision]
        if self.checkpointing != "none":
            tail = {"full": "", "selective": "-selective", "sequential": f"-sequential={self.segments}"}
            words.append("checkpoint" + tail[self.checkpointing])
        words += [self.attention] if self.attention != "sdpa" else []
        words += ["chunked-loss"] if self.is_loss_chunked else []
        words += [f"{self.states}-states"] if self.states != "auto" else []
        words += [self.sharding] if self.sharding != "none" else []
        for name in ("optimizer", "params", "activations"):
            words += [f"offload-{name}"] if getattr(self, f"has_{name}_offloaded") else []
        return ",".join(words)


def parse(text: str, option: str = "--technique") -> Recipe:
    """The recipe of names joined by commas, like `bf16,checkpoint`.

    Raises: ConfigError for a name that is none, for two of one kind, and for what does not go together.
    """
    given: dict[str, Any] = {}
    for name in (word.strip() for word in text.split(",")):
        for key, value in _meaning(name, option).items():
            if key in given and given[key] != value and not (key == "segments"):
                raise ConfigError(
                    f"{option} {text!r} gives {key} twice, {given[key]} and {value}; leave one of the two out"
                )
            given[key] = value
    try:
        return replace(Recipe(), **given)
    except ConfigError as error:
        raise ConfigError(f"{option} {text}: {error}") from None


def _meaning(name: str, option: str) -> dict[str, Any]:
    """Fields of a recipe that a name sets."""
    fixed: dict[str, dict[str, Any]] = {
        **{one: {"precision": one} for one in PRECISIONS},
        **{one: {"attention": one} for one in ATTENTIONS},
        **{one: {"sharding": one} for one in SHARDINGS},
        "checkpoint": {"checkpointing": "full"},
        "checkpoint-selective": {"checkpointing": "selective"},
        "chunked-loss": {"is_loss_chunked": True},
        "bf16-states": {"states": "bf16"},
        "8bit-states": {"states": "8bit"},
        "offload-optimizer": {"has_optimizer_offloaded": True},
        "offload-params": {"has_params_offloaded": True},
        "offload-activations": {"has_activations_offloaded": True},
    }
    if name in fixed:
        return fixed[name]
    kind, equals, count = name.partition("=")
    if kind == "checkpoint-sequential":
        if not (equals and count.isascii() and count.isdecimal() and 1 <= int(count) <= 10_000):
            raise ConfigError(f"{option} {name!r} names no number of segments; write for example {kind}=4")
        return {"checkpointing": "sequential", "segments": int(count)}
    raise ConfigError(f"{option} {name!r} is no technique; the techniques are {', '.join(NAMES)}, joined by commas")


def check(recipe: Recipe, *, num_layers: int, ranks: int, on_gpu: bool) -> None:
    """Whether a recipe can run so. Raises: ConfigError."""
    if recipe.checkpointing == "sequential" and recipe.segments > num_layers:
        raise ConfigError(
            f"checkpoint-sequential={recipe.segments} is more segments than the model's {num_layers} layers; "
            "give at most "
            f"{num_layers}"
        )
    if ranks > 1 and recipe.sharding == "none":
        raise ConfigError(
            f"{recipe.text} over {ranks} ranks: nothing would be shared between them; add fsdp, zero1, zero2 "
            "or zero3, or "
            "give --ranks 1"
        )
    only_gpu = {"sdpa-efficient", "sdpa-cudnn", "flash-attn"}
    if not on_gpu and recipe.attention in only_gpu:
        raise ConfigError(f"{recipe.attention} runs on GPUs only; take sdpa, sdpa-flash, sdpa-math or eager on a CPU")
    if not on_gpu and recipe.precision == "tf32":
        raise ConfigError("tf32 is a mode of NVIDIA's tensor cores; take fp32 on a CPU")
