"""Small fleets on a virtual clock, whose times can be worked out by hand."""

from collections.abc import Sequence
from typing import Any

from harness.places import MODELS
from kervan.cli.plan import model_spec
from kervan.config.workload import TraceRow, parse_slo
from kervan.facts import hardware
from kervan.facts.layout import Layout
from kervan.sim import limits
from kervan.sim.constants import Constants
from kervan.sim.step_time import Batch
from kervan.simulate.duration import fixed
from kervan.simulate.engine import EngineFacts
from kervan.simulate.fixed import FixedNumber
from kervan.simulate.fleet import Simulation
from kervan.simulate.setup import FleetSetup, LoadSetup, PoolSetup
from kervan.simulate.tally import Outcome

# Gateways that take no time.
AT_ONCE = Constants(prompt_s=0.0, prompt_token_s=0.0, output_s=0.0, delivery_s=0.0)


class EvenTimes:
    """Each step takes a second, whatever is in it."""

    composes_ahead = True

    def __init__(
        self, *, num_blocks: int = 1000, max_num_seqs: int = 8, max_num_batched_tokens: int = 100, step_s: float = 1.0
    ) -> None:
        self.num_blocks = num_blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.context_token_s = 0.0
        self._step_s = step_s

    def step_s(self, batch: Batch) -> float:
        return self._step_s


def engine(constants: Constants = AT_ONCE, kv_tokens: int = 16_000) -> EngineFacts:
    spec, gpu = model_spec(str(MODELS / "llama3-8b")), hardware.gpu("H200")
    return EngineFacts(
        spec=spec, layout=Layout(1, 1), gpu=gpu, limits=limits.limits(spec, gpu, {}), constants=constants,
        kv_tokens=kv_tokens,
    )  # fmt: skip


def requests(*rows: tuple[float, int, int]) -> LoadSetup:
    """Of (seconds, prompt tokens, output tokens)."""
    return LoadSetup(trace=tuple(TraceRow(at_s, prompt, output) for at_s, prompt, output in rows))


def pool(minimum: int = 1, maximum: int | None = None, start_s: float = 10.0, **more: Any) -> PoolSetup:
    most = minimum if maximum is None else maximum
    named: dict[str, Any] = {"name": "on-demand", "minimum": minimum, "maximum": most, "start": fixed(start_s), **more}
    return PoolSetup(**named)


def setup(load: LoadSetup, pools: Sequence[PoolSetup] = (), slo: str = "ttft=3s,tpot=2s", **more: Any) -> FleetSetup:
    chosen: dict[str, Any] = {"engine": engine(), "stop_s": 0.0, **more}
    return FleetSetup(pools=tuple(pools) or (pool(),), load=load, slo=parse_slo(slo), **chosen)


def simulate(fleet: FleetSetup, policy: Any = None, seed: int = 0, times: Any = None) -> Outcome:
    return Simulation(fleet, policy or FixedNumber(), seed, times=times or EvenTimes()).run()
