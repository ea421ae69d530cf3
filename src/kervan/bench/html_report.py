"""The HTML report: one file, nothing to load from elsewhere, for someone who did not run the benchmark."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kervan.bench import report_plots
from kervan.bench.report_plots import LABELS, ReportedRun
from kervan.bench.tally import METRICS
from kervan.report import page
from kervan.units import format_duration

# A metric -> one that it equals unless a load has what tells them apart; then it has no row of its own.
_SAME_AS = {"answer_s": "ttft_s", "token_gap_s": "gap_s", "ttft_from_arrival_s": "ttft_s"}
_DEFINITIONS = (
    *((LABELS[metric], meaning) for metric, meaning in METRICS.items()),
    ("output tokens/s", "output tokens of whole requests, over the time from the first sending to the last end"),
    ("goodput", "requests per second that kept every bound of the SLO, TTFT counted from the intended arrival"),
    ("intended arrival", "when the schedule wanted the request sent; in a closed loop, the moment of sending"),
    ("failed", "all requests that did not end whole; they are in no latency and in no token count"),
    ("95% interval", "by bootstrap over 32 stretches of the run"),
)


def write(path: Path, runs: Sequence[ReportedRun], title: str | None = None) -> None:
    """Write the report of one run, or of a sweep, to `path`.

    Raises: ConfigError when jinja2 or plotly is not installed.
    """
    page.check("--html", "bench")
    text = page.render(
        "bench",
        {"number": _number, "duration": _duration},
        title=title or _title(runs),
        subtitle=_subtitle(runs[0].record),
        verdict=_verdict(runs),
        runs=runs,
        distributions=_distributions,
        definitions=_DEFINITIONS,
        reproduction=_reproduction(runs),
        figures=report_plots.figures(runs),
        plotly=page.plotly_source(),
    )
    path.write_text(text)


def _number(value: float, digits: int = 0) -> str:
    return f"{value:,.{digits}f}"


def _duration(seconds: float | None) -> str:
    return "-" if seconds is None else format_duration(seconds) if seconds >= 5e-9 else "0"


def _server(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the server said of itself; nothing in records of earlier versions."""
    return record["result"].get("server") or {}


def _title(runs: Sequence[ReportedRun]) -> str:
    """`Load test of Qwen3-8B at 64 streams on a simulated H200`: what a reader looks for among reports."""
    target, server = runs[0].record["target"], _server(runs[0].record)
    model = target["model"].rstrip("/").rpartition("/")[2] or target["url"]
    loads = runs[0].name if len(runs) == 1 else f"{runs[0].name} to {runs[-1].name}"
    where = f" on {'simulated ' if server.get('simulated') else ''}{server.get('gpu') or 'GPUs'}"
    return f"Load test of {model}: {loads}" + (where if server.get("gpu") or server.get("simulated") else "")


def _subtitle(record: Mapping[str, Any]) -> str:
    target, hardware = record["target"], record["hardware"]
    parts = [target["url"]]
    server = _server(record)
    if server.get("words"):
        parts.append(server["words"])
    elif target.get("server_version"):
        parts.append(f"server version {target['server_version']}")
    if server.get("simulated"):
        parts.append("times are computed, not those of a GPU")
    parts.append(record["date"].replace("T", " ").replace("+00:00", " UTC"))
    parts.append(", ".join([f"client on {hardware['cpu']}", f"{hardware['cores']} cores", *hardware["gpus"]]))
    return " \u00b7 ".join(parts)


@dataclass(frozen=True, slots=True)
class ReportVerdict:
    """Whether the runs can be believed, and why. `kind`: of its box; empty, `open` or `bad`."""

    word: str
    kind: str
    checks: tuple[str, ...]
    doubts: tuple[str, ...]
    notes: tuple[str, ...]


def _verdict(runs: Sequence[ReportedRun]) -> ReportVerdict:
    results = [run.record["result"] for run in runs]
    statuses = [result["reconciliation"]["status"] for result in results]
    floors = [result["client_floor"] for result in results if result["client_floor"] is not None]
    floor_check = "The client's own overhead was not measured."
    if floors:
        worst = max(floors, key=lambda floor: float(floor["ttft_s"]))
        floor_check = (
            f"The client measured itself first: it adds {format_duration(worst['ttft_s'])} to TTFT and "
            f"{format_duration(worst['gap_s'])} to a gap."
        )
    counters_check = "The server's own counters could not be read."
    if all(status == "agrees" for status in statuses):
        counters_check = "The server's own counters agree with the client's."
    elif "disagrees" in statuses:
        counters_check = "The server's own counters disagree with the client's; see below."
    doubts = tuple(
        doubt if len(runs) == 1 else f"{run.name}: {doubt}" for run in runs for doubt in run.record["result"]["doubts"]
    )
    notes = tuple(
        note if len(runs) == 1 else f"{run.name}: {note}"
        for run in runs
        for note in run.record["result"].get("notes", ())
    )
    word, kind = ("Valid", "") if floors else ("Not calibrated", "open")
    if doubts or "disagrees" in statuses:
        word, kind = "Not valid" if doubts else "Doubtful", "bad"
    return ReportVerdict(word, kind, (floor_check, counters_check), doubts, notes)


def _distributions(result: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(label, distribution) of each metric that says something of its own."""
    for metric in METRICS:
        values = result[metric]
        same = result[_SAME_AS.get(metric, metric)]
        if values["count"] and (same is values or any(values[q] != same[q] for q in ("p50", "p99", "max"))):
            yield LABELS[metric], values


def _reproduction(runs: Sequence[ReportedRun]) -> str:
    """The command, the client's versions, and the loads."""
    record = runs[0].record
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    loads = "\n".join(json.dumps(run.record["load"]) for run in runs)
    return f"{record['command']}\n\nclient: {versions}\nload: {loads}"
