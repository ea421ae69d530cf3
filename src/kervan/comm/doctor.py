"""`kervan comm doctor`: facts, a short measurement, and a verdict for each check."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from kervan.comm import bench, examine, facts, gather, gpu_checks, host_checks, measured_checks, settings_checks
from kervan.comm.bench import BenchSettings
from kervan.comm.check import Advice, Check
from kervan.comm.facts import HostFacts, Measured
from kervan.ranks.rank import Nodes

MIN_RANKS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorSettings:
    """As of `BenchSettings`. `has_bench`: whether ranks are started."""

    device: str | None = None
    ranks: int | None = None
    has_bench: bool = True
    nodes: Nodes = Nodes()  # noqa: RUF009 - frozen
    for_s: float = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Every check with its verdict, the environment for this host, and what it was concluded from."""

    checks: tuple[Check, ...]
    environment: tuple[Advice, ...]
    host: HostFacts
    measured: Measured | None
    notes: tuple[str, ...] = ()

    @property
    def has_failed(self) -> bool:
        return any(check.verdict == "fail" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "checks": [asdict(check) for check in self.checks],
            "environment": [asdict(line) for line in self.environment],
            "facts": facts.to_json(self.host),
            "measured": None if self.measured is None else facts.to_json(self.measured),
            "notes": list(self.notes),
        }


def examine_host(
    host: HostFacts, measured: Measured | None, *, nodes: int = 1, why_not: str = "not asked for"
) -> list[Check]:
    """All checks over what is known."""
    return [
        *gpu_checks.checks(host, measured),
        *host_checks.checks(host, nodes=nodes),
        *settings_checks.checks(host, nodes=nodes),
        *measured_checks.checks(host, measured, why_not=why_not),
    ]


def run(settings: DoctorSettings, *, say: Callable[[str], None]) -> Report:
    """Look, measure, judge. Raises: ConfigError as `bench.place` and `bench.check`."""
    wanted = BenchSettings(device=settings.device, ranks=settings.ranks, nodes=settings.nodes, bytes=(8,))
    where = bench.place(wanted)
    if settings.has_bench:
        bench.check(wanted, where)
    say("looking at the host")
    host = gather.host()
    measured, why_not = None, "--no-bench"
    if settings.has_bench:
        of = where.ranks * settings.nodes.count
        say(f"measuring over {of} ranks, {where.name}")
        measured = examine.run(
            examine.full(on_gpu=where.on_gpu),
            num_ranks=where.ranks,
            for_s=settings.for_s,
            nodes=settings.nodes,
            say=say,
        )
    checks = examine_host(host, measured, nodes=settings.nodes.count, why_not=why_not)
    notes = () if where.on_gpu else ("no GPU was measured: ranks on CPU show that this host's network and limits work",)
    return Report(
        checks=tuple(checks),
        environment=tuple(settings_checks.advice(host, nodes=settings.nodes.count)),
        host=host,
        measured=measured,
        notes=notes,
    )
