"""How one model is cut and copied, and which cuts a model allows."""

import math
from dataclasses import dataclass

from kervan.errors import ConfigError
from kervan.facts.architecture import ModelSpec

KEYS = ("tp", "pp", "dp", "ep")


@dataclass(frozen=True, slots=True, order=True)
class Layout:
    """`tp` GPUs share each layer, `pp` stages hold consecutive layers, `dp` copies; `ep`: GPUs that share out the
    experts of a layer whole, 1 or `tp`.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1

    @property
    def gpus_per_replica(self) -> int:
        """GPUs of one replica, tp x pp; expert parallelism takes none of its own."""
        return self.tp * self.pp

    @property
    def gpus(self) -> int:
        """GPUs of all `dp` replicas."""
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        parts = [f"TP{self.tp}"] if self.tp > 1 or self.pp == 1 else []
        parts += [f"PP{self.pp}"] if self.pp > 1 else []
        parts += [f"EP{self.ep}"] if self.ep > 1 else []
        replica = "x".join(parts)
        return f"{self.dp} x {replica}" if self.dp > 1 else replica


def parse_layout(text: str) -> dict[str, int]:
    """`"tp=2,pp=2"` as the sizes it names.

    Raises: ConfigError.
    """
    named: dict[str, int] = {}
    for item in text.split(","):
        key, separator, value = item.partition("=")
        key = key.strip().lower()
        if not separator or key not in KEYS or not value.strip().isdecimal() or not 1 <= int(value) <= 65_536:
            raise ConfigError(
                f"layout {item.strip()!r} is none of tp=, pp=, dp=, ep= with a number from 1; "
                "write for example tp=2,pp=2"
            )
        if key in named:
            raise ConfigError(f"layout {text!r} gives {key} twice; give it once")
        named[key] = int(value)
    return named


def tensor_sizes(spec: ModelSpec, most: int) -> list[int]:
    """All `tp` up to `most` that this model allows: they divide the heads, and KV heads or are a multiple of them."""
    return [tp for tp in range(1, most + 1) if _why_not_tp(spec, tp) is None]


def _why_not_tp(spec: ModelSpec, tp: int) -> str | None:
    if spec.num_heads % tp:
        return f"does not divide {spec.num_heads} attention heads"
    kv = spec.num_kv_heads
    if spec.mla is None and kv % tp and tp % kv:
        return f"neither divides {kv} KV heads nor is a multiple of them"
    if spec.experts is not None and spec.experts.width % tp:
        return f"does not divide the experts' width of {spec.experts.width}"
    if spec.experts is None and spec.intermediate % tp:
        return f"does not divide the MLP's width of {spec.intermediate}"
    return None


def check(spec: ModelSpec, layout: Layout) -> None:
    """Raises: ConfigError for a cut that the model does not allow, with the sizes that it does."""
    if (reason := _why_not_tp(spec, layout.tp)) is not None:
        fitting = [str(tp) for tp in tensor_sizes(spec, min(spec.num_heads, 64))]
        raise ConfigError(f"tp={layout.tp} {reason}; use {_one_of(fitting)} (--tp, or --layout tp=)")
    if layout.pp > spec.num_layers:
        raise ConfigError(
            f"pp={layout.pp} stages need as many layers, the model has {spec.num_layers}; "
            f"use at most pp={spec.num_layers}"
        )
    if layout.ep > 1 and spec.experts is None:
        raise ConfigError(f"ep={layout.ep} spreads experts, and the model has none; use ep=1 (tp spreads all layers)")
    if layout.ep not in (1, layout.tp):
        raise ConfigError(f"ep={layout.ep} is neither 1 nor tp={layout.tp}; use ep={layout.tp}, or ep=1")
    if layout.ep > 1 and spec.experts is not None and spec.experts.count % layout.ep:
        fitting = [str(n) for n in range(1, 65) if spec.experts.count % n == 0]
        raise ConfigError(f"ep={layout.ep} does not divide {spec.experts.count} experts; use {_one_of(fitting)}")


def stages(spec: ModelSpec, pp: int) -> list[range]:
    """The layers of each stage, as vLLM deals them: what is left over goes to the stages before the last.

    Source: `get_pp_indices` of vLLM 0.24.
    """
    counts = [spec.num_layers // pp] * pp
    for i in range(spec.num_layers % pp):
        counts[-2 - i if pp > 1 else -1] += 1
    starts = [sum(counts[:i]) for i in range(pp)]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]


def sizes(spec: ModelSpec, *, gpus: int, gpus_per_node: int) -> list[Layout]:
    """All replicas (dp 1) on at most `gpus` GPUs: TP within a node, PP over what is left; with experts also their EP.

    `pp` beyond one node counts in whole nodes' worth of stages: a stage's GPUs are never on two nodes.
    """
    replicas: list[Layout] = []
    for tp in tensor_sizes(spec, min(gpus, gpus_per_node)):
        if tp & (tp - 1) and gpus_per_node % tp:
            continue  # three of eight GPUs leave two idle
        for pp in range(1, min(gpus // tp, spec.num_layers) + 1):
            replica = Layout(tp, pp)
            copies = most_copies(replica, gpus=gpus, gpus_per_node=gpus_per_node)
            is_whole = copies * tp * pp == gpus
            # Idle GPUs only where their number leaves no choice: four of six, but not 60 of 64.
            if not copies or not (is_whole or (gpus & (gpus - 1) and not (tp * pp) & (tp * pp - 1))):
                continue
            if spec.num_layers % pp and pp & (pp - 1) and not gpus & (gpus - 1):
                continue
            replicas.append(replica)
            if spec.experts is not None and tp > 1 and spec.experts.count % tp == 0:
                replicas.append(Layout(tp, pp, ep=tp))
    return replicas


def most_copies(replica: Layout, *, gpus: int, gpus_per_node: int) -> int:
    """How many replicas the GPUs hold when no TP group is cut by the end of a node."""
    gpus_per_node = min(gpus, gpus_per_node)
    groups = gpus // gpus_per_node * (gpus_per_node // replica.tp)
    return groups // replica.pp


def nodes_per_replica(layout: Layout, gpus_per_node: int) -> int:
    """The fewest nodes that hold a replica whose TP groups are not cut."""
    stages_per_node = max(1, gpus_per_node // layout.tp)
    return math.ceil(layout.pp / stages_per_node)


def _one_of(alternatives: list[str]) -> str:
    return alternatives[0] if len(alternatives) == 1 else f"{', '.join(alternatives[:-1])} or {alternatives[-1]}"
