"""What an engine's start was spent on, from its own clock and vLLM's log."""

import re
from collections.abc import Mapping

from kervan.vendor.vllm_names import GRAPHS_LINE, INIT_LINE, WEIGHTS_LINE


def split(phases: Mapping[str, float], log: str) -> dict[str, float]:
    """Seconds of a start, in order, which sum up to all of it.

    `phases`: what the process measured: `imports`, `config`, `engine`, `canary`. vLLM's log takes `engine` apart into
    `workers` (their processes, devices, collectives), `weights`, `compile`, `graphs` and `profiling` (of memory, and
    warm-up). What the log does not tell stays in the part before.
    """

    def logged_s(line: re.Pattern[str], group: str = "seconds") -> float:
        values = [match[group] for match in line.finditer(log)]  # of several workers' lines the last counts
        return float(values[-1] or 0) if values else 0.0

    if "engine" not in phases:
        return dict(phases)
    weights, init, graphs = logged_s(WEIGHTS_LINE), logged_s(INIT_LINE), logged_s(GRAPHS_LINE)
    compiling = logged_s(INIT_LINE, "compiling")
    parts = {
        "imports": phases["imports"],
        "config": phases["config"],
        "workers": phases["engine"] - weights - init,
        "weights": weights,
        "compile": compiling,
        "graphs": graphs,
        "profiling": init - compiling - graphs,
        "canary": phases["canary"],
    }
    return {name: round(max(0.0, seconds), 2) for name, seconds in parts.items()}
