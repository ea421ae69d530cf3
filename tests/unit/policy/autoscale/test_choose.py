from typing import Any

import pytest

from kervan.config.fleet import from_mapping
from kervan.policy.autoscale import choose
from kervan.policy.autoscale.ray_target import RayTarget
from kervan.policy.autoscale.slo import SloPolicy
from kervan.policy.autoscale.state import FleetState, PoolState


def asked(**settings: Any) -> Any:
    return from_mapping({"model": "m", **settings}, "f").autoscaler


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"replicas": "1..8"}, SloPolicy),
        ({"replicas": "1..8", "autoscaling": {"target_ongoing_requests": 5}}, RayTarget),
        ({"pools": {"on-demand": "1..3", "spot": "0..6"}, "policy": "fill"}, choose.Fill),
    ],
)
def test_settings_name_their_policy(settings: dict[str, Any], kind: type) -> None:
    found = choose.policy(asked(**settings))
    assert isinstance(found, kind)
    assert isinstance(choose.policy(asked(**settings), name="ray"), RayTarget)


def test_fill_asks_for_all_spot_and_the_least_on_demand_whatever_the_load() -> None:
    fill = choose.policy(asked(pools={"on-demand": "1..3", "spot": "0..6"}, policy="fill"))
    pools = (
        PoolState(name="on-demand", minimum=1, maximum=3, target=1),
        PoolState(name="spot", minimum=0, maximum=6, target=0),
    )
    state = FleetState(now_s=0.0, local_minute=0, pools=pools, replicas=(), demand=None)
    assert fill.decide(state, {}).targets == {"on-demand": 1, "spot": 6}
