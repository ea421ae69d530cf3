"""The planner: all layouts of a model on some GPUs, ranked. Each step is a module, and knows those before it alone."""

import dataclasses

from kervan.errors import CapacityError
from kervan.plan.bands import bands
from kervan.plan.evaluate import CLOSE_LOOK, FIRST_LOOK, GLANCE, Care, Simulations
from kervan.plan.explain import LayoutPlan, explain, nothing_fits
from kervan.plan.load import PlanLoad, load
from kervan.plan.rank import LIKELY, PlannedLayout, better_elsewhere, planned, rank, unfit
from kervan.plan.remedies import remedies
from kervan.plan.request import PlanRequest
from kervan.plan.screen import ScreenedLayout, screen

REFINED = 3  # so many of many layouts, those in front, get a close look


def search(request: PlanRequest) -> LayoutPlan:
    """Every layout that the model and the GPUs allow, or the one that `request.fixed` names.

    Raises: ConfigError for a load that is longer than the engine takes, or a layout that the model does not allow.
    CapacityError when nothing fits, with what is missing and what would do.
    """
    loaded = load(request)
    screened = screen(loaded)
    if not any(candidate.fits for candidate in screened):
        raise CapacityError(nothing_fits(loaded, [unfit(loaded, candidate) for candidate in screened]))
    simulations = Simulations(loaded)
    if request.counts_gpus:
        screened = [_counted(simulations, one) if one.fits else one for one in screened]
    is_few = len(screened) <= REFINED
    of_layout = {candidate.layout: candidate for candidate in screened}
    care = CLOSE_LOOK if is_few else GLANCE
    ranked = rank(request, [_planned(loaded, simulations, one, GLANCE if one.is_rough else care) for one in screened])
    has_rough = any(one.is_rough for one in screened) or (not is_few and request.concurrency is None)
    if not is_few:
        front = [c for c in ranked[:REFINED] if c.fits]
        elsewhere = better_elsewhere(request, ranked)
        front += [elsewhere] if elsewhere is not None and elsewhere not in front else []
        again = [_planned(loaded, simulations, of_layout[c.layout], CLOSE_LOOK) for c in front]
        others = [c for c in ranked if c not in front]
        if request.concurrency is None:
            others = [dataclasses.replace(c, is_rough=c.fits) for c in others]
        ranked = rank(request, [*again, *others])
    return explain(loaded, ranked, remedies=_remedies(request, ranked), has_rough=has_rough)


def _remedies(request: PlanRequest, ranked: list[PlannedLayout]) -> list[str]:
    return [] if ranked[0].meets_slo >= LIKELY else remedies(request, ranked[0])


def _counted(simulations: Simulations, screened: ScreenedLayout) -> ScreenedLayout:
    care = GLANCE if screened.is_rough else FIRST_LOOK
    return dataclasses.replace(screened, copies=simulations.copies_needed(screened, care))


def _planned(loaded: PlanLoad, simulations: Simulations, screened: ScreenedLayout, care: Care) -> PlannedLayout:
    if not screened.fits:
        return unfit(loaded, screened)
    evaluation = simulations.evaluate(screened, care)
    return planned(loaded, evaluation, bands(loaded, evaluation))
