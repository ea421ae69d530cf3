"""The planner: all layouts of a model on some GPUs, ranked. Each step is a module, and knows those before it alone."""

from kervan.errors import CapacityError
from kervan.plan.bands import bands
from kervan.plan.evaluate import SEEDS, Simulations
from kervan.plan.explain import LayoutPlan, explain, nothing_fits
from kervan.plan.load import PlanLoad, load
from kervan.plan.rank import PlannedLayout, planned, rank, unfit
from kervan.plan.request import PlanRequest
from kervan.plan.screen import ScreenedLayout, screen

REFINED = 3  # so many of many layouts are simulated with all seeds


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
    is_few = len(screened) <= REFINED
    of_layout = {candidate.layout: candidate for candidate in screened}
    ranked = rank(request, [_planned(loaded, simulations, candidate, SEEDS if is_few else 1) for candidate in screened])
    if not is_few:  # a second look at those in front, from more runs
        again = [_planned(loaded, simulations, of_layout[candidate.layout], SEEDS) for candidate in ranked[:REFINED]]
        ranked = rank(request, [*again, *ranked[REFINED:]])
    return explain(loaded, ranked, has_rough=any(candidate.is_rough for candidate in screened))


def _planned(loaded: PlanLoad, simulations: Simulations, screened: ScreenedLayout, seeds: int) -> PlannedLayout:
    if not screened.fits:
        return unfit(loaded, screened)
    evaluation = simulations.evaluate(screened, seeds=seeds)
    return planned(loaded, evaluation, bands(loaded.request, evaluation))
