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
    if not any(one.fits for one in screened):
        raise CapacityError(nothing_fits(loaded, [unfit(loaded, one) for one in screened]))
    simulations = Simulations(loaded)
    is_few = len(screened) <= REFINED
    of_layout = {one.layout: one for one in screened}
    ranked = rank(request, [_planned(loaded, simulations, one, SEEDS if is_few else 1) for one in screened])
    if not is_few:  # a second look at those in front, from more runs
        again = [_planned(loaded, simulations, of_layout[one.layout], SEEDS) for one in ranked[:REFINED]]
        ranked = rank(request, [*again, *ranked[REFINED:]])
    return explain(loaded, ranked, has_rough=any(one.is_rough for one in screened))


def _planned(loaded: PlanLoad, simulations: Simulations, one: ScreenedLayout, seeds: int) -> PlannedLayout:
    if not one.fits:
        return unfit(loaded, one)
    evaluation = simulations.evaluate(one, seeds=seeds)
    return planned(loaded, evaluation, bands(loaded.request, evaluation))
