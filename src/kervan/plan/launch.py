"""A plan as what is to be started: `kervan up`, vLLM's arguments, Ray's resources."""

import dataclasses
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kervan.facts import layout as layouts
from kervan.plan.candidates import Candidate, Question, step_time
from kervan.sim.step_time import Batch

GRAPH_STEP = 8  # vLLM's captured batches are multiples of it


@dataclass(frozen=True, slots=True)
class Launch:
    """`bundles`: what Ray holds for each replica, a bundle per node. `target_ongoing_requests`: sequences that a
    replica is planned to run at once, the target of an autoscaler.
    """

    words: tuple[str, ...]
    engine_args: Mapping[str, Any]
    replicas: int
    bundles: tuple[Mapping[str, float], ...]
    target_ongoing_requests: int

    @property
    def command(self) -> str:
        return shlex.join(self.words)


def launch(question: Question, candidate: Candidate, model: str) -> Launch:
    """How to start a candidate. Batch limits are explicit: vLLM guesses them from the GPU that it sees when it reads
    its configuration, which on a Ray head without a GPU is none.
    """
    c, limits = candidate, candidate.limits
    sequences = max(GRAPH_STEP, round(c.mean_batch))
    engine_args: dict[str, Any] = {
        "max_model_len": limits.max_model_len,
        "max_num_batched_tokens": limits.max_num_batched_tokens,
        "max_num_seqs": min(limits.max_num_seqs, max(64, -(-2 * sequences // GRAPH_STEP) * GRAPH_STEP)),
        **dict(question.arguments.items()),
    }
    words = ["kervan", "up", model, "--tp", str(c.layout.tp)]
    words += ["--pp", str(c.layout.pp)] if c.layout.pp > 1 else []
    words += ["--ep", str(c.layout.ep)] if c.layout.ep > 1 else []
    words += ["--replicas", str(c.layout.dp)]
    for key, value in engine_args.items():
        words += ["--engine-arg", f"{key}={value}"]
    nodes = layouts.nodes_per_replica(c.layout, question.gpus_per_node)
    bundle = {"GPU": float(c.layout.gpus_per_replica // nodes)}
    return Launch(tuple(words), engine_args, c.layout.dp, (bundle,) * nodes, sequences)


def explain(question: Question, candidate: Candidate) -> list[tuple[str, float, float]]:
    """(term, ms in a decode step, ms in a prefill step) of one pass through all stages, the largest first.

    The decode step runs the planned batch at its mean context, the prefill step a full token budget of prompts.
    """
    isl, osl = question.mean_tokens
    time = step_time(question, dataclasses.replace(candidate.layout, dp=1), candidate.limits)
    sequences = max(1, round(candidate.mean_batch))
    decode = Batch(sequences, sequences * (isl + osl / 2), 0, 0.0, sequences)
    tokens = candidate.limits.max_num_batched_tokens
    prefill = Batch(0, 0, tokens, tokens * min(isl, tokens) / 2, max(1, int(tokens / isl)))
    rows: dict[str, list[float]] = {}
    for column, batch in enumerate((decode, prefill)):
        for index in range(time.layout.pp):
            terms = time.terms(index, batch)
            for name in terms.__slots__:
                rows.setdefault(name, [0.0, 0.0])[column] += 1000 * getattr(terms, name)
        if time.layout.pp > 1:
            rows.setdefault("hand_over", [0.0, 0.0])[column] += 1000 * (time.layout.pp - 1) * time.hand_over_s(batch)
    named = [(name, first, second) for name, (first, second) in rows.items() if first or second]
    return sorted(named, key=lambda row: -row[1])
