"""What an engine's start was spent on, from its own clock and vLLM's log."""

import re
from collections.abc import Mapping

# Both supported versions write these; of several workers' lines the last counts.
_WEIGHTS = re.compile(r"Model loading took .* ([\d.]+) seconds")
_INIT = re.compile(r"init engine \(profile, create kv cache, warmup model\) took ([\d.]+) s")
_COMPILE = re.compile(r"init engine \(.*\(compilation: ([\d.]+) s")
_GRAPHS = re.compile(r"Graph capturing finished in ([\d.]+) secs")


def split(phases: Mapping[str, float], log: str) -> dict[str, float]:
    """Seconds of a start, in order, which sum up to all of it.

    `phases`: what the process measured: `imports`, `config`, `engine`, `canary`. vLLM's log takes `engine` apart into
    `workers` (their processes, devices, collectives), `weights`, `compile`, `graphs` and `profiling` (of memory, and
    warm-up). What the log does not tell stays in the part before.
    """

    def told(pattern: re.Pattern[str]) -> float:
        found = pattern.findall(log)
        return float(found[-1]) if found else 0.0

    if "engine" not in phases:
        return dict(phases)
    weights, init, compiling, graphs = told(_WEIGHTS), told(_INIT), told(_COMPILE), told(_GRAPHS)
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
