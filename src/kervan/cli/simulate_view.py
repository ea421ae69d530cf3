"""What `kervan simulate` prints for people."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from kervan.cli.plan import console_is_wide
from kervan.units import format_duration, plural

if TYPE_CHECKING:
    from kervan.simulate.compare import Compared
    from kervan.simulate.replica_rate import ReplicaRate
    from kervan.simulate.setup import FleetSetup


def print_compared(
    setup: "FleetSetup", compared: "list[Compared]", rate: "ReplicaRate | None", notes: list[str]
) -> None:
    """A row for each policy."""
    console = Console(highlight=False, width=None if console_is_wide() else 160)
    first = compared[0].outcomes[0]
    console.print(
        f"{first.requests:,} requests in {format_duration(first.duration_s)}, SLO {setup.slo}; "
        + ", ".join(f"{pool.name} {pool.minimum}..{pool.maximum}" for pool in setup.pools)
        + f", {setup.pools[0].start.text} from a decision to ready",
        soft_wrap=True,
    )
    for note in notes:
        console.print(note, soft_wrap=True, markup=False, style="dim")
    table = Table(box=None, pad_edge=False, header_style="dim")
    names = (
        "policy", "in SLO", "mean replicas", "hours", "USD", "$/Mtok", "TTFT p50", "p95", "p99", "TPOT p95", "shed",
        "moves", "broken",
    )  # fmt: skip
    for name in names:
        table.add_column(name, justify="left" if name == "policy" else "right")
    for one in compared:
        usd, per_mtok = one.mean(lambda o: o.usd), one.mean(lambda o: o.usd_per_mtok)
        table.add_row(
            one.name,
            _share(one),
            _replicas(one),
            f"{one.mean(lambda o: sum(o.replica_hours.values())) or 0:,.2f}",
            "" if usd is None else f"{usd:,.2f}",
            "" if per_mtok is None else f"{per_mtok:.2f}",
            _duration(one.mean(lambda o: o.ttft_s["p50"])),
            _duration(one.mean(lambda o: o.ttft_s["p95"])),
            _duration(one.mean(lambda o: o.ttft_s["p99"])),
            _duration(one.mean(lambda o: o.tpot_s["p95"])),
            f"{one.mean(lambda o: o.shed):,.0f}",
            f"{one.mean(lambda o: o.moves):,.0f}",
            f"{one.mean(lambda o: o.broken):,.0f}",
        )
    console.print(table)
    outcomes = [outcome for one in compared for outcome in one.outcomes]
    speed = sum(o.requests for o in outcomes) / max(1e-9, sum(o.computed_s for o in outcomes))
    console.print(
        f"replicas are counted from the decision to start them, until the pools are back at their least; "
        f"{plural(len(outcomes), 'run')}, {speed:,.0f} requests per second of computing",
        style="dim", soft_wrap=True,
    )  # fmt: skip


def _share(one: "Compared") -> str:
    interval = one.interval(lambda o: o.attained)
    share = one.mean(lambda o: o.attained) or 0.0
    return f"{share:.2%}" + (f" ({interval[0]:.1%}..{interval[1]:.1%})" if interval else "")


def _replicas(one: "Compared") -> str:
    interval = one.interval(lambda o: o.mean_replicas)
    mean = one.mean(lambda o: o.mean_replicas) or 0.0
    return f"{mean:.2f}" + (f" ({interval[0]:.2f}..{interval[1]:.2f})" if interval else "")


def _duration(seconds: float | None) -> str:
    return "-" if seconds is None else format_duration(seconds)
