"""The autoscaling policy that a fleet's settings ask for, with what is known of its replicas."""

import logging
from collections.abc import Iterable

from kervan.config.fleet import FleetConfig
from kervan.errors import KervanError
from kervan.policy.autoscale import choose
from kervan.policy.autoscale import leaving as who_leaves
from kervan.policy.autoscale.state import FleetState, Policy, ReplicaModel
from kervan.serve.scaler.starts import PRIOR_S

logger = logging.getLogger(__name__)

ACCELERATOR = "accelerator_type:"  # of Ray's resources
TWIN_START_S = 3.0  # of a twin's process and its actor, beside what it pretends


def of_fleet(config: FleetConfig, kinds: Iterable[str] = (), *, name: str = "") -> Policy | None:
    """None where its settings leave no choice. `kinds`: of the nodes; `name`: of another policy than the settings say.

    Raises: ConfigError for settings that contradict each other.
    """
    asked = config.autoscaler
    return None if asked is None else choose.policy(asked, replica_model(config, kinds), name=name)


def replica_model(config: FleetConfig, kinds: Iterable[str]) -> ReplicaModel | None:
    """What one replica can do, from the planner's step times; None where they do not know the device or the model."""
    try:
        return _twin(config) if config.engine == "twin" else _engine(config, kinds)
    except (KervanError, OSError, ValueError) as error:
        logger.warning("what a replica can do is learned from what it does: %s", error)
        return None


def _twin(config: FleetConfig) -> ReplicaModel:
    from kervan.twin import capacity, settings

    return capacity.capacity(settings.settings(config))


def _engine(config: FleetConfig, kinds: Iterable[str]) -> ReplicaModel | None:
    from kervan.facts import architecture, hardware
    from kervan.facts import model as models
    from kervan.facts.layout import Layout
    from kervan.plan.calibration import PRIOR
    from kervan.sim import capacity, memory
    from kervan.sim import limits as engine_limits
    from kervan.sim.step_time import StepTime

    gpus = [row for kind in kinds if (row := hardware.find(kind.removeprefix(ACCELERATOR))) is not None]
    described = models.read_config(config.model)
    if not gpus or described is None:
        return None
    spec = engine_limits.as_served(architecture.parse(described, f"{config.model}/config.json"), config.engine_args)
    layout, gpu = Layout(config.tp, config.pp, 1, config.ep), gpus[0]
    arguments = {"max_model_len": spec.max_model_len, **config.engine_args}
    if config.gpu_share < 1:
        arguments.setdefault("gpu_memory_utilization", round(0.9 * config.gpu_share, 3))
    limits = engine_limits.limits(spec, gpu, arguments)
    room = memory.estimate(spec, layout, gpu, limits)
    return capacity.ReplicaCapacity(StepTime(spec, layout, gpu, limits, PRIOR.constants), max(1, room.kv_tokens))


def start_prior_s(config: FleetConfig) -> float:
    """How long a replica takes to start, before one has."""
    if config.engine == "twin":
        from kervan.twin.settings import start_s

        return TWIN_START_S + start_s(config)
    return PRIOR_S


def leaving(state: FleetState) -> tuple[str, ...]:
    """All replicas that are not leaving yet, those first that are to go first."""
    return who_leaves.choose(state.replicas, {pool.name: 0 for pool in state.pools})
