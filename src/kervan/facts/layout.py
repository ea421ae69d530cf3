"""How one model is cut and copied, and which cuts a model allows."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from kervan.errors import ConfigError
from kervan.facts.architecture import Attention, Cut, Experts, Layer, Mlp, ModelSpec, StateLayer
from kervan.facts.architecture.spec import Mixer

KEYS = ("tp", "pp", "dp", "ep", "attention_dp")
PRINTED = re.compile(r"(?i)(?:(\d+) ?x ?)?([a-z]+\d+(?:x[a-z]+\d+)*)")


@dataclass(frozen=True, slots=True, order=True)
class Layout:
    """`tp` GPUs share each layer, `pp` stages hold consecutive layers, `dp` copies; `ep`: GPUs that share out the
    experts of a layer whole, 1 or `tp`.

    `attention_dp`: data-parallel ranks inside one replica (vLLM's `data_parallel_size` with experts): each has all
    weights but the routed experts, which are shared out over the ranks (`ep`), and a KV cache and requests of its own.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    attention_dp: int = 1

    @property
    def gpus_per_stage(self) -> int:
        """GPUs that hold a layer of one replica, on one node."""
        return self.tp * self.attention_dp

    @property
    def gpus_per_replica(self) -> int:
        """GPUs of one replica, tp x attention_dp x pp; expert parallelism takes none of its own."""
        return self.gpus_per_stage * self.pp

    @property
    def gpus(self) -> int:
        """GPUs of all `dp` replicas."""
        return self.gpus_per_replica * self.dp

    @property
    def starts_with(self) -> Literal["kervan up", "vllm serve"]:
        """What starts it: a replica of `kervan up` is one engine core, and each data-parallel rank is another."""
        return "kervan up" if self.attention_dp == 1 else "vllm serve"

    def __str__(self) -> str:
        parts = [f"ADP{self.attention_dp}"] if self.attention_dp > 1 else []
        parts += [f"TP{self.tp}"] if self.tp > 1 or (self.pp == 1 and not parts) else []
        parts += [f"PP{self.pp}"] if self.pp > 1 else []
        parts += [f"EP{self.ep}"] if self.ep > 1 else []
        replica = "x".join(parts)
        return f"{self.dp} x {replica}" if self.dp > 1 else replica


def parse_layout(text: str) -> dict[str, int]:
    """`"tp=2,pp=2"` as the sizes it names; also as a `Layout` is printed, `"TP2xPP2"` and `"4 x TP2"`.

    Raises: ConfigError.
    """
    named: dict[str, int] = {}
    printed = PRINTED.fullmatch(text.strip())
    if printed is not None:
        copies = [f"dp={printed[1]}"] if printed[1] else []
        text = ",".join([*copies, *(re.sub(r"(?i)(p)(\d)", r"\1=\2", part) for part in printed[2].split("x"))])
    for item in text.split(","):
        key, separator, value = item.partition("=")
        key = key.strip().lower()
        key = "attention_dp" if key == "adp" else key
        if not separator or key not in KEYS or not value.strip().isdecimal() or not 1 <= int(value) <= 65_536:
            raise ConfigError(
                f"layout {item.strip()!r} is none of tp=, pp=, dp=, ep=, attention_dp= with a number from 1; "
                "write for example tp=2,pp=2"
            )
        if key in named:
            raise ConfigError(f"layout {text!r} gives {key} twice; give it once")
        named[key] = int(value)
    return named


def tensor_sizes(spec: ModelSpec, most: int, *, ep: bool = False) -> list[int]:
    """All `tp` up to `most` that this model allows: they divide the heads, and KV heads or are a multiple of them.

    With `ep` experts stay whole, so their width does not matter.
    """
    return [tp for tp in range(1, most + 1) if _why_not_tp(spec, tp, ep=ep) is None]


def _why_not_tp(spec: ModelSpec, tp: int, *, ep: bool = False) -> str | None:
    for layer, _ in spec.distinct:
        for mixer in layer.mixers:
            if (reason := _why_not_mixer(mixer, tp)) is not None:
                return reason
        for feed in layer.feed_forwards:
            if isinstance(feed, Mlp) and feed.width % tp and not (spec.experts and ep):
                return f"does not divide the MLP's width of {feed.width}"
            if isinstance(feed, Experts) and feed.width % tp and not ep:
                return f"does not divide the experts' width of {feed.width}"
        if (reason := _why_not_blocks(spec, layer, tp, ep=ep)) is not None:
            return reason
    return None


def _why_not_mixer(mixer: Mixer, tp: int) -> str | None:
    if isinstance(mixer, StateLayer):
        return None if mixer.units % tp == 0 else f"does not divide {mixer.units} units of a {mixer.name} layer"
    if mixer.num_heads % tp:
        return f"does not divide {mixer.num_heads} attention heads"
    if isinstance(mixer, Attention) and mixer.num_kv_heads % tp and tp % mixer.num_kv_heads:
        return f"neither divides {mixer.num_kv_heads} KV heads nor is a multiple of them"
    return None


def _why_not_blocks(spec: ModelSpec, layer: Layer, tp: int, *, ep: bool) -> str | None:
    """A cut of a matrix whose blocks of weights share a scale must not go through a block.

    Source: `validate_fp8_block_shape` and `validate_fp8_block_shape_moe`, vLLM 0.32.
    """
    q = spec.quantization
    if q is None or not q.block[0] or tp == 1:
        return None
    routed = [] if layer.experts is None or ep else [*layer.experts.each]
    for weight in (*layer.weights, *routed):
        if weight.storage.arithmetic == "16 bit":
            continue
        for side, block in ((weight.outputs, q.block[0]), (weight.inputs, q.block[1])):
            for cut in side:
                if isinstance(cut, Cut) and cut.count >= tp and (cut.count // tp * cut.size) % block:
                    name = weight.modules[-1].rpartition(".")[2]
                    size = cut.count * cut.size
                    return (
                        f"cuts the {size} of {'experts' if weight.part == 'experts' else name} into "
                        f"{size // tp} each, which the FP8 blocks of {block} do not divide"
                    )
    return None


def check(spec: ModelSpec, layout: Layout) -> None:
    """Raises: ConfigError for a cut that the model does not allow, with the sizes that it does."""
    if layout.attention_dp > 1:
        _check_attention_dp(spec, layout)
        return
    has_ep = layout.ep > 1
    if (reason := _why_not_tp(spec, layout.tp, ep=has_ep)) is not None:
        fitting = [str(tp) for tp in tensor_sizes(spec, min(spec.num_heads, 64), ep=has_ep)]
        whole = ""
        if not has_ep and spec.experts is not None and _why_not_tp(spec, layout.tp, ep=True) is None:
            whole = f", or ep={layout.tp}, which keeps experts whole"
        raise ConfigError(f"tp={layout.tp} {reason}; use {_one_of(fitting)} (--tp, or --layout tp=){whole}")
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


def _check_attention_dp(spec: ModelSpec, layout: Layout) -> None:
    ranks = layout.attention_dp
    if spec.experts is None:
        raise ConfigError(
            f"attention_dp={ranks} shares experts out over data-parallel ranks, and the model has none; use "
            f"dp={ranks}, whose copies do not wait for each other"
        )
    if (layout.tp, layout.pp) != (1, 1):
        raise ConfigError(
            f"attention_dp={ranks} with tp={layout.tp} and pp={layout.pp} is not counted: a rank is one GPU; use "
            f"attention_dp={ranks} alone, or tp and pp without it"
        )
    if layout.ep != ranks:
        raise ConfigError(
            f"attention_dp={ranks} shares the experts out over its {ranks} ranks, and ep={layout.ep} does not; use "
            f"ep={ranks}, or leave ep out"
        )
    if spec.experts.count % ranks:
        fitting = [str(n) for n in range(2, 65) if spec.experts.count % n == 0]
        raise ConfigError(f"attention_dp={ranks} does not divide {spec.experts.count} experts; use {_one_of(fitting)}")


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
    """All replicas (dp 1) on at most `gpus` GPUs: TP within a node, PP over what is left; with experts also their EP,
    and data-parallel attention within a node.

    `pp` beyond one node counts in whole nodes' worth of stages: a stage's GPUs are never on two nodes.
    """
    replicas: list[Layout] = []
    most = min(gpus, gpus_per_node)
    whole, cut = tensor_sizes(spec, most, ep=spec.experts is not None), tensor_sizes(spec, most)
    for tp in sorted({*whole, *cut}):
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
            if tp in cut:
                replicas.append(replica)
            if tp in whole and spec.experts is not None and tp > 1 and spec.experts.count % tp == 0:
                replicas.append(Layout(tp, pp, ep=tp))
    for ranks in range(2, most + 1):
        replica = Layout(ep=ranks, attention_dp=ranks)
        if spec.experts is None or spec.experts.count % ranks or (ranks & (ranks - 1) and gpus_per_node % ranks):
            continue
        if most_copies(replica, gpus=gpus, gpus_per_node=gpus_per_node) * ranks == gpus:
            replicas.append(replica)
    return replicas


def most_copies(replica: Layout, *, gpus: int, gpus_per_node: int) -> int:
    """How many replicas the GPUs hold when the GPUs of no stage are on two nodes."""
    gpus_per_node = min(gpus, gpus_per_node)
    groups = gpus // gpus_per_node * (gpus_per_node // replica.gpus_per_stage)
    return groups // replica.pp


def nodes_per_replica(layout: Layout, gpus_per_node: int) -> int:
    """The fewest nodes that hold a replica whose stages are each on one node."""
    stages_per_node = max(1, gpus_per_node // layout.gpus_per_stage)
    return math.ceil(layout.pp / stages_per_node)


def _one_of(alternatives: list[str]) -> str:
    return alternatives[0] if len(alternatives) == 1 else f"{', '.join(alternatives[:-1])} or {alternatives[-1]}"
