"""What a gateway's actor tells of a gateway that cannot start, or is gone."""

from types import SimpleNamespace
from typing import Any

import pytest

from kervan.errors import FleetError
from kervan.fleet.directory import StartFailure
from kervan.gateway.control import GatewayFailed
from kervan.serve import gateway_actor
from kervan.serve.gateway_actor import GatewayReplica


class Directory:
    def __init__(self) -> None:
        self.reported: list[StartFailure] = []

    def report_failure(self, failure: StartFailure) -> Any:
        self.reported.append(failure)

        async def within(_: float) -> None:
            if failure.message == "nobody hears":
                raise FleetError("the directory does not answer")

        return SimpleNamespace(within=within)


class Gateway(GatewayReplica):
    """One that Python may collect: nobody awaits what `__del__` gives, as Serve does."""

    def __del__(self) -> None:  # type: ignore[override]
        pass


@pytest.fixture
def replica(monkeypatch: pytest.MonkeyPatch) -> Any:
    made: Any = Gateway.__new__(Gateway)
    made._id, made._log_path, made._directory = "gw-1", "gw.log", Directory()
    made._process = SimpleNamespace(ended=SimpleNamespace(is_set=lambda: True))
    made._is_stopping = True  # nothing is to be ended
    made.exits = []
    monkeypatch.setattr(gateway_actor.os, "_exit", made.exits.append)
    return made


@pytest.mark.parametrize("message", ["signal SIGKILL", "nobody hears"])
async def test_an_actor_goes_with_its_gateway(replica: Any, message: str) -> None:
    replica._has_begun = True
    replica._on_failure(GatewayFailed("FleetError", message))
    await replica._reporting
    assert replica._directory.reported == [StartFailure("gw-1", "FleetError", message, "gw.log")]
    assert replica.exits == [1]


def test_the_kind_of_gpu_is_that_by_which_gateways_are_placed() -> None:
    assert gateway_actor.gpu_kind({"CPU": 0.0, "accelerator_type:H200": 0.001}) == "H200"
    assert gateway_actor.gpu_kind({"CPU": 1.0}) == ""


async def test_it_stays_with_a_gateway_that_lives(replica: Any) -> None:
    replica._has_begun = True
    replica._process.ended.is_set = lambda: False
    replica._on_failure(GatewayFailed("ConfigError", "vLLM refuses"))
    await replica._reporting
    assert (len(replica._directory.reported), replica.exits) == (1, [])


async def test_a_start_that_fails_is_told_by_the_start(replica: Any) -> None:
    replica._has_begun = False
    replica._on_failure(GatewayFailed("ConfigError", "vLLM refuses"))
    assert (replica._directory.reported, replica.exits) == ([], [])
