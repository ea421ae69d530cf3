"""What Serve's controller is told when it asks how many replicas there are to be."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from harness.live import eventually
from ray import cloudpickle

from kervan.config.fleet import FleetConfig, from_mapping
from kervan.serve import autoscaling, ray_internals
from kervan.serve.scaler import wanted
from kervan.serve.scaler.wanted import Wanted


class Store:
    """Ray's own store, which may be away."""

    def __init__(self) -> None:
        self.value: bytes | None = None
        self.is_away = False
        self.num_reads = 0

    def get(self, key: str) -> bytes | None:
        self.num_reads += 1
        if self.is_away:
            raise RuntimeError("no GCS")
        return self.value


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    found = Store()
    monkeypatch.setattr(ray_internals, "kv_get", found.get)
    monkeypatch.setattr(ray_internals, "let_choose_who_stops", lambda leaving: None)
    monkeypatch.setattr(wanted, "READ_PERIOD_S", 0.005)
    reader = wanted._Reader()
    monkeypatch.setattr(wanted, "_reader", reader)
    yield found
    reader._asked_s.clear()  # its thread reads no more


def asked(pool: str = "on-demand", target: int = 2) -> int:
    """The number for a pool that is to have `target` replicas now."""
    context: Any = SimpleNamespace(app_name="kervan-chat", deployment_name=pool, target_num_replicas=target)
    count, state = autoscaling.count_replicas(context)
    assert state == {}
    return count


def test_what_the_scaler_wants_is_read_and_kept_when_the_store_is_away(store: Store) -> None:
    assert asked() == 2  # nothing was read yet: as it is
    store.value = msgspec.json.encode(Wanted({"on-demand": 5}, ["b", "a"]))
    eventually(lambda: asked() == 5, "what is wanted", 10, every_s=0.005)
    assert asked("spot", 3) == 3  # of which nothing is said
    assert list(wanted.leaving("kervan-chat")) == ["b", "a"]
    assert list(wanted.leaving("another-app")) == []
    store.is_away, reads = True, store.num_reads
    eventually(lambda: store.num_reads > reads + 3, "the store is asked in vain", 10, every_s=0.005)
    assert asked() == 5
    store.is_away, store.value = False, b"what another version wrote"
    reads = store.num_reads
    eventually(lambda: store.num_reads > reads + 3, "it is asked again", 10, every_s=0.005)
    assert asked() == 5


def test_serve_can_pickle_the_policy_by_value() -> None:
    """As Serve does with the module of a policy: nothing in it may be a thread, a lock or a connection."""
    cloudpickle.register_pickle_by_value(autoscaling)
    try:
        for function in (autoscaling.count_replicas, autoscaling.count_gateways):
            assert cloudpickle.loads(cloudpickle.dumps(function)).__name__ == function.__name__
    finally:
        cloudpickle.unregister_pickle_by_value(autoscaling)


@pytest.mark.parametrize(
    ("settings", "bounds"),
    [
        ({"replicas": 3}, (3, 3)),
        ({"replicas": 2, "max_replicas": 8}, (0, 8)),
        ({"replicas": 0, "max_replicas": 4}, (0, 4)),
    ],
)
def test_serve_bounds_a_fixed_number_and_leaves_a_range_to_the_scaler(
    settings: dict[str, int], bounds: tuple[int, int]
) -> None:
    config: FleetConfig = from_mapping({"model": "m", **settings}, "a test")
    told = autoscaling.pool(config, "on-demand")
    assert (told["min_replicas"], told["max_replicas"]) == bounds
    assert "initial_replicas" not in told  # or each change of other settings would begin with it again
    assert told["upscale_delay_s"] == told["downscale_delay_s"] == 0.0
