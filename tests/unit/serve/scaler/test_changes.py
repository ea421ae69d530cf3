"""How often a pool's target went up or down is told, whoever changed it, and outlives the directory."""

from kervan.config.fleet import FleetConfig
from kervan.fleet.directory import Snapshot
from kervan.policy.autoscale.state import Decision, FleetState
from kervan.serve.scaler.scaler import Scaler


class Steps:
    """A policy with a list of targets."""

    name = "ray"

    def __init__(self, *targets: int) -> None:
        self._targets = list(targets)

    def decide(self, state: FleetState, memory: object) -> Decision:
        return Decision(targets={"on-demand": self._targets.pop(0)}, reason="a test")


class Clock:
    now_s = 1e6

    def __call__(self) -> float:
        return self.now_s


def test_changes_of_the_policy_and_of_settings_count() -> None:
    clock, policy = Clock(), Steps(3, 3, 1, 4)
    config = FleetConfig(model="m", replicas=1, max_replicas=4, policy="ray")
    scaler = Scaler(config, clock=clock, unix=clock, make=lambda *_: policy)
    assert scaler.scaling.changes == {"on-demand": {"up": 0, "down": 0}}
    for _ in range(4):
        clock.now_s += 1.0
        scaler.decide(Snapshot(1, [], [], []))
    assert scaler.scaling.changes == {"on-demand": {"up": 2, "down": 1}}
    scaler.set_config(FleetConfig(model="m", replicas=1, max_replicas=2, policy="ray"))
    assert scaler.scaling.changes == {"on-demand": {"up": 2, "down": 2}}
    again = Scaler(config, scaler.to_store(), clock=clock, unix=clock, make=lambda *_: policy)
    assert again.scaling.changes == {"on-demand": {"up": 2, "down": 2}}
