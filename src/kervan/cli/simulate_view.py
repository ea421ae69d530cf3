"""What `kervan simulate` prints for people."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from kervan.cli.plan import console_is_wide
from kervan.simulate import html_report
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
        table.add_row(*html_report.table_row(one))
    console.print(table)
    outcomes = [outcome for one in compared for outcome in one.outcomes]
    speed = sum(o.requests for o in outcomes) / max(1e-9, sum(o.computed_s for o in outcomes))
    console.print(
        f"replicas are counted from the decision to start them, until the pools are back at their least; "
        f"{plural(len(outcomes), 'run')}, {speed:,.0f} requests per second of computing",
        style="dim", soft_wrap=True,
    )  # fmt: skip
