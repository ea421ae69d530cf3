"""A profile as lines of plain text: where the time went, what the GPU waited for, and what to change next. Pure."""

from collections.abc import Iterator, Mapping, Sequence

from kervan.profile.device import KernelTotal
from kervan.profile.summary import TOP_PARTS, EngineSummary, Summary
from kervan.units import format_duration, plural

NUM_KERNELS = 6
LEAST_SHARE = 0.005


def lines(summary: Summary) -> Iterator[str]:
    """At most about 25."""
    yield f"replica {summary.replica}, {summary.window_s:g} s"
    if summary.engine is not None:
        yield from _engine(summary.engine)
    if summary.num_requests:
        yield f"time of {plural(summary.num_requests, 'request')}: {listed(summary.request_shares)}"
    for gateway in summary.gateways[:2]:
        cost = f", {gateway.us_per_token:.0f} us of CPU per token" if gateway.us_per_token else ""
        yield f"gateway {gateway.id}: {gateway.busy:.0%} of a core, {gateway.tokens_per_s:,.0f} tokens/s{cost}"
        if gateway.parts:
            most = sorted(gateway.parts.items(), key=lambda item: -item[1])[:TOP_PARTS]
            parts = ", ".join(f"{name} {us:.1f}" for name, us in most)
            yield f"  us per token, by {plural(gateway.num_samples, 'sample')}: {parts}"
    for who, stacks in summary.stacks.items():
        if who.startswith("replica") and stacks.num_samples:
            yield f"Python of the engine: {listed({name: stacks.share(name) for name, _ in stacks.parts})}"
    yield f"next: {summary.next}"
    for problem in summary.left_out:
        yield f"left out: {problem}"


def _engine(engine: EngineSummary) -> Iterator[str]:
    batch = engine.batch
    reached = ", as many as asked for" if engine.ended_by == "steps" else ""
    yield (
        f"traced {plural(batch.num_steps, 'step')} in {format_duration(engine.window_s)}{reached}: "
        f"{batch.streams:.1f} streams a step, {batch.prefill_share:.0%} of the tokens are prompts, "
        f"{format_duration(batch.step_s)} a step; then it stood still for {format_duration(engine.standstill_s)}"
    )
    if engine.gpu:
        yield f"{engine.gpu} waits for: {engine.waits_for}"
        yield f"  {listed(engine.shares)}"
        yield f"engine's loop: {listed(engine.host_shares)}"
    else:
        yield f"no GPU; the engine's loop: {listed(engine.host_shares)}"
    if engine.kernels:
        yield "top kernels:" if engine.gpu else "top operations, without what is within them:"
    yield from kernel_lines(engine.kernels, most=NUM_KERNELS)


def kernel_lines(kernels: Sequence[KernelTotal], *, most: int) -> Iterator[str]:
    """A line each: share, calls, name, and which side of the roofline it is on."""
    for kernel in kernels[:most]:
        bound = "" if kernel.bound == "unknown" else f"  {kernel.bound}"
        yield f"  {kernel.share:5.1%}  {kernel.calls:>7,} x  {kernel.name}{bound}"


def listed(shares: Mapping[str, float], most: int = TOP_PARTS) -> str:
    """Like `decode 91%, prefill 8%`, the largest first."""
    found = [(name, share) for name, share in shares.items() if share >= LEAST_SHARE]
    return (
        ", ".join(f"{name} {share:.0%}" for name, share in sorted(found, key=lambda item: -item[1])[:most]) or "nothing"
    )
