"""The check before a replica on several GPUs joins: whether they reach each other, rightly and fast enough.

Ranks of its own, in the replica's reservation, for some seconds; they are gone before the engine takes memory.
"""

import os
import time
from collections.abc import Callable, Mapping

from kervan.comm import examine, gather, gpu_checks, host_checks, measured_checks, settings_checks
from kervan.comm.check import Check
from kervan.comm.examine import ExaminePlan
from kervan.comm.facts import HostFacts, Measured
from kervan.errors import EngineError
from kervan.ranks.rank import Nodes

FOR_S = 300.0  # importing torch alone may take minutes on a busy host; each later step has a limit of its own
MEMORY_WAIT_S = 60.0  # the worker of an engine that was killed holds its GPU's memory for seconds more
MEMORY_PERIOD_S = 2.0
# A host is refused for what was measured, and for what ends the engine later; the rest only explains.
REFUSED_FOR = ("measurement", "results", "bandwidth", "transport", "slow-rank", "versions", "shm")
# Of the figure of a link: what is slower is broken, what is between is the doctor's. Over PCIe, replicas that start
# beside each other share the host's bridges.
MIN_SHARE, MIN_PCIE_SHARE = 0.5, 0.1
MIN_SHM_BYTES = 256 << 20  # what vLLM's workers of one replica share


def refusal(host: HostFacts, measured: Measured, *, nodes: int = 1) -> str:
    """Why this host is not used, in one line; empty if it may be."""
    is_nvlink = bool(host.gpus) and gpu_checks.hardware_kind(host.gpus[0]).startswith("nvlink")
    min_share = MIN_SHARE if is_nvlink else MIN_PCIE_SHARE
    checks = [
        *gpu_checks.checks(host, measured),
        *host_checks.checks(host, nodes=nodes),
        *settings_checks.checks(host, nodes=nodes),
        *measured_checks.checks(host, measured, min_share=min_share),
    ]
    failed = [check for check in checks if check.verdict == "fail"]
    refused = [check for check in failed if check.name in REFUSED_FOR]
    if (host.shm_bytes or 0) >= MIN_SHM_BYTES:
        refused = [check for check in refused if check.name != "shm"]
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
    end_s = time.monotonic() + MEMORY_WAIT_S
    while True:
        measured = examine.run(plan, num_ranks=num_ranks, for_s=for_s, nodes=nodes, env=env, say=say)
        if "out of memory" not in measured.problem or nodes.count > 1 or time.monotonic() > end_s:
            break
        time.sleep(MEMORY_PERIOD_S)
    if why := refusal(gather.host({**os.environ, **(env or {})}), measured, nodes=nodes.count):
        raise EngineError(why)
    return measured
