"""What one twin can do, for the autoscaling policy: the formula of its steps in the place of the planner's."""

from dataclasses import dataclass
from typing import cast

from kervan.facts.layout import Layout
from kervan.plan.calibration import PRIOR
from kervan.sim.capacity import ReplicaCapacity
from kervan.sim.constants import Constants
from kervan.sim.step_time import Batch, StepTime
from kervan.twin.token_engine import TwinSettings

ONE_GPU = Layout()


@dataclass(frozen=True, slots=True)
class _TwinSteps:
    """Answers what `ReplicaCapacity` asks of a `StepTime`."""

    settings: TwinSettings
    layout: Layout = ONE_GPU
    constants: Constants = PRIOR.constants
    is_pipelined: bool = False

    @property
    def max_num_seqs(self) -> int:
        return self.settings.limits.max_num_seqs

    @property
    def max_num_batched_tokens(self) -> int:
        return self.settings.limits.max_num_batched_tokens

    def stage_s(self, index: int, batch: Batch) -> float:
        timing = self.settings.timing
        step_s = timing.step_s(
            prefill_tokens=batch.prefill_tokens, sequences=batch.sequences, context_tokens=round(batch.context_tokens)
        )
        return step_s / self.settings.speed


def capacity(settings: TwinSettings) -> ReplicaCapacity:
    """Of a replica that is a twin with these settings."""
    limits = settings.limits
    return ReplicaCapacity(cast(StepTime, _TwinSteps(settings)), limits.num_blocks * limits.block_size)
