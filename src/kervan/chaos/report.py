"""The result of a run of chaos."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kervan.chaos import effects
from kervan.chaos.effects import Disruption
from kervan.chaos.plans import DisruptionPlan, ReplayPlan
from kervan.chaos.schedule import DisruptionKind
from kervan.chaos.verify import Difference
from kervan.stats import quantile


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeHistory:
    """What became of the nodes of a replay. `over_time`: how many there were, and ready replicas, at each change.

    `requests_cut`: requests that were longer than the model takes.
    """

    nodes_added: int
    nodes_removed: int
    over_time: Sequence[Mapping[str, float]]
    requests_cut: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ChaosReport:
    """`streams` have ended, whole or broken; `unfinished` ones were cut off by Ctrl-C. `plan`: what was asked for."""

    plan: DisruptionPlan | ReplayPlan
    engine: str
    target_replicas: int
    wall_s: float
    disruptions: Sequence[Disruption]
    skipped: Mapping[DisruptionKind, int]
    streams: int
    unfinished: int
    tokens: int
    broken: int
    difference: Difference
    errors: Mapping[str, int]
    messages: Mapping[str, str]
    moves: int
    longest_s: Sequence[float]
    client_late_s: float = 0.0  # the latest that a timer of the client's loop was
    was_interrupted: bool = False
    nodes: NodeHistory | None = None

    @property
    def unrecovered(self) -> list[Disruption]:
        """Disruptions after which the fleet was never whole; with Ctrl-C nobody has waited for that."""
        if self.was_interrupted:
            return []
        return [disruption for disruption in self.disruptions if disruption.whole_s is None]

    @property
    def is_good(self) -> bool:
        """Whether streams were checked, all came whole and right, and the fleet is whole again."""
        faults = (self.broken, self.difference.lost, self.difference.doubled, self.difference.wrong)
        return self.streams > 0 and not any(faults) and not self.unrecovered

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints; scripts rely on these keys. Seconds; None where there is nothing to take it of."""
        gaps_s = effects.moved_gaps_s(self.longest_s, self.moves)
        return {
            "disruptions": len(self.disruptions),
            "streams": self.streams,
            "broken": self.broken,
            "tokens_lost": self.difference.lost,
            "tokens_doubled": self.difference.doubled,
            "moves": self.moves,
            "gap_s": {**_quantiles(gaps_s, p50=0.5, p99=0.99), "max": _rounded(max(gaps_s, default=None))},
            "recover_s": self._recovery(self.disruptions),
            "client_late_s": _rounded(self.client_late_s),
            "tokens": self.tokens,
            "tokens_wrong": self.difference.wrong,
            "skipped": sum(self.skipped.values()),
            "unrecovered": len(self.unrecovered),
            "unfinished": self.unfinished,
            "kinds": {kind: self._of_kind(kind) for kind in self.skipped},
            "errors": {kind: {"count": n, "first": self.messages[kind]} for kind, n in self.errors.items()},
            "engine": self.engine,
            "replicas": self.target_replicas,
            "wall_s": round(self.wall_s, 1),
            "was_interrupted": self.was_interrupted,
            "asked": asdict(self.plan),
            **({} if self.nodes is None else asdict(self.nodes)),
        }

    def _of_kind(self, kind: DisruptionKind) -> dict[str, Any]:
        of_kind = [disruption for disruption in self.disruptions if disruption.kind == kind]
        return {"disruptions": len(of_kind), "skipped": self.skipped[kind], "recover_s": self._recovery(of_kind)}

    @staticmethod
    def _recovery(disruptions: Sequence[Disruption]) -> dict[str, float | None]:
        took_s = [disruption.recover_s for disruption in disruptions if disruption.recover_s is not None]
        return {**_quantiles(took_s, p50=0.5), "max": _rounded(max(took_s, default=None))}


def _quantiles(values: Sequence[float], **shares: float) -> dict[str, float | None]:
    return {name: _rounded(quantile(values, share) if values else None) for name, share in shares.items()}


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
