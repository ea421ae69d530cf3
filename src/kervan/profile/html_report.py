"""A profile as one HTML page, with nothing to load from elsewhere."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from kervan.profile.summary import Summary
from kervan.report import page
from kervan.units import format_duration

NUM_KERNELS = 30
NUM_FUNCTIONS = 15
Rows = list[tuple[str, float, str]]


def check() -> None:
    """Raises: ConfigError when the page could not be written."""
    page.check("kervan profile", "profile")


def write(path: Path, summary: Summary, *, subtitle: str, command: str, perfetto: str, summary_file: str) -> None:
    """Write the page of a profile to `path`. Raises: ConfigError when jinja2 is not installed."""
    check()
    engine = summary.engine
    text = page.render(
        "profile",
        {"duration": _duration},
        title=f"Profile of {summary.replica}",
        subtitle=subtitle,
        summary=summary,
        cards=list(_cards(summary)),
        tables=list(_tables(summary)),
        kernels=() if engine is None else engine.kernels[:NUM_KERNELS],
        kernel_heading="Kernels" if engine is not None and engine.gpu else "Operations, without what is within them",
        perfetto=perfetto,
        summary_file=summary_file,
        command=command,
    )
    path.write_text(text)


def _duration(seconds: float) -> str:
    return format_duration(seconds) if seconds >= 5e-9 else "0"


def _cards(summary: Summary) -> Iterator[tuple[str, str]]:
    engine = summary.engine
    if engine is not None:
        if engine.gpu:
            yield engine.waits_for, f"what the {engine.gpu} waits for"
        yield f"{engine.batch.num_steps:,}", f"steps traced in {format_duration(engine.window_s)}"
        yield _duration(engine.batch.step_s), "a step"
        yield f"{engine.batch.streams:.1f}", "streams a step"
        yield f"{engine.batch.prefill_share:.0%}", "of the tokens are prompts"
        yield _duration(engine.standstill_s), "without a step, to write the trace"
    for gateway in summary.gateways:
        yield f"{gateway.busy:.0%}", f"of a core: gateway {gateway.id}"
        if gateway.us_per_token:
            yield f"{gateway.us_per_token:.0f} us", f"of CPU per token: gateway {gateway.id}"


def _tables(summary: Summary) -> Iterator[tuple[str, str, Rows]]:
    engine = summary.engine
    if engine is not None and engine.gpu:
        yield f"What the {engine.gpu}'s time goes to", "", _shares(engine.shares)
    if engine is not None:
        yield (
            "The engine's loop",
            "what is in two parts at once counts for the first of them",
            _shares(engine.host_shares),
        )
    if summary.num_requests:
        yield "Time of requests", f"of {summary.num_requests} that were in flight", _shares(summary.request_shares)
    for gateway in summary.gateways:
        if gateway.parts:
            rows = [(name, us / gateway.us_per_token, f"{us:.1f} us") for name, us in gateway.parts.items()]
            yield f"CPU per token of gateway {gateway.id}", "its CPU time, divided by py-spy's samples", rows
    for who, stacks in summary.stacks.items():
        count = stacks.num_samples
        if count:
            note = f"{count:,} samples of threads that worked, {stacks.num_waiting:,} of threads that waited"
            functions = stacks.functions[:NUM_FUNCTIONS]
            yield f"Python of {who}", note, _shares({name: stacks.share(name) for name, _ in stacks.parts})
            yield (
                f"Functions of {who}",
                "innermost frames",
                [(name, n / count, f"{n / count:.1%}") for name, n in functions],
            )


def _shares(shares: Mapping[str, float]) -> Rows:
    return [(name, share, f"{share:.1%}") for name, share in sorted(shares.items(), key=lambda item: -item[1])]
