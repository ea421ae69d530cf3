"""The check before a replica on several GPUs joins: whether they reach each other, rightly and fast enough.

Ranks of its own, in the replica's reservation, for about five seconds; they are gone before the engine takes memory.
"""

import os
from collections.abc import Callable, Mapping

from kervan.comm import examine, gather, gpu_checks, host_checks, measured_checks, settings_checks
from kervan.comm.check import Check
from kervan.comm.examine import ExaminePlan
from kervan.comm.facts import HostFacts, Measured
from kervan.comm.ranks import Nodes
from kervan.errors import EngineError

FOR_S = 90.0  # importing torch alone may take half a minute on a busy host
# A host is refused for what was measured, and for what ends the engine later; the rest only explains.
REFUSED_FOR = ("measurement", "results", "bandwidth", "transport", "slow-rank", "versions", "shm")
MIN_SHARE = 0.5  # of the figure of a link: what is slower is broken, what is between is the doctor's


def refusal(host: HostFacts, measured: Measured, *, nodes: int = 1) -> str:
    """Why this host is not used, in one line; empty if it may be."""
    checks = [
        *gpu_checks.checks(host, measured),
        *host_checks.checks(host, nodes=nodes),
        *settings_checks.checks(host, nodes=nodes),
        *measured_checks.checks(host, measured, min_share=MIN_SHARE),
    ]
    failed = [check for check in checks if check.verdict == "fail"]
    refused = [check for check in failed if check.name in REFUSED_FOR]
    if not refused:
        return ""
    causes = [check for check in failed if check not in refused]
    return _line(host.host, refused[0], causes[0] if causes else None)


def _line(host: str, check: Check, cause: Check | None) -> str:
    why = f"; {cause.name}: {cause.cause}" if cause is not None else ""
    fix = cause.fix if cause is not None else check.fix
    return (
        f"host {host} fails the preflight: {check.name}: {check.cause}{why}; {fix}; kervan comm doctor there tells "
        "more, and --no-preflight starts all the same"
    )


def run(
    *, num_ranks: int, on_gpu: bool, nodes: Nodes = Nodes(), plan: ExaminePlan | None = None, for_s: float = FOR_S,  # noqa: B008
    env: Mapping[str, str] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Measured:  # fmt: skip
    """Measure between the ranks of a replica. `env`: of its engine, beside this process's.

    Raises: EngineError, in one line, for a host that is refused.
    """
    plan = plan or examine.brief(on_gpu=on_gpu)
    measured = examine.run(plan, num_ranks=num_ranks, for_s=for_s, nodes=nodes, env=env, say=say)
    if why := refusal(gather.host({**os.environ, **(env or {})}), measured, nodes=nodes.count):
        raise EngineError(why)
    return measured
