"""A layout under several loads: what `--plot` draws."""

import dataclasses
from dataclasses import dataclass

from kervan.plan.evaluate import FIRST_LOOK, Simulations
from kervan.plan.load import load
from kervan.plan.rank import PlannedLayout
from kervan.plan.request import PlanRequest
from kervan.plan.screen import screen

SHARES = (0.1, 0.3, 0.5, 0.7, 0.85, 1.0)  # of the load that a layout is planned with


@dataclass(frozen=True, slots=True)
class LoadPoint:
    """One load: requests per second over all replicas, output tokens per second and GPU, and the median TPOT."""

    requests_s: float
    tok_s_per_gpu: float
    tpot_p50_ms: float


def curve(request: PlanRequest, planned: PlannedLayout) -> list[LoadPoint]:
    """A layout that fits, from a tenth of its load to all of it; loads that it does not serve are left out."""
    size = planned.layout
    gpus = max(request.gpus, size.gpus)
    same = dataclasses.replace(
        request,
        fixed={"tp": size.tp, "pp": size.pp, "dp": size.dp, "ep": size.ep, "attention_dp": size.attention_dp},
        counts_gpus=False,
        gpus=gpus,
        nodes=request.nodes if gpus % request.nodes == 0 else 1,
    )
    points = []
    for share in SHARES:
        if request.concurrency is not None:
            shared = dataclasses.replace(same, concurrency=max(1, round(share * request.concurrency)))
        else:
            shared = dataclasses.replace(same, rate=share * planned.requests_s, trace=())
        loaded = load(shared)
        found = Simulations(loaded).evaluate(screen(loaded)[0], FIRST_LOOK)
        if found.is_stable:
            points.append(LoadPoint(found.requests_s, found.out_tok_s / size.gpus, found.tpot_p50_ms))
    return points
