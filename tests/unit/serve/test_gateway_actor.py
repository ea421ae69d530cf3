"""How a gateway that cannot start is reported."""

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kervan.errors import ConfigError, FleetError
from kervan.fleet.directory import StartFailure
from kervan.serve.gateway_actor import GatewayReplica


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ConfigError("no such\n  argument"), "ConfigError", "no such argument"),
        (OSError("port 8000 is taken"), "OSError", "port 8000 is taken"),
        (SystemExit(2), "SystemExit", "2"),
    ],
    ids=["refused", "the port is taken", "a parser of arguments that exits"],
)
def test_a_gateway_that_does_not_start_is_reported_in_one_line(error: BaseException, kind: str, message: str) -> None:
    async def start(**_: Any) -> None:
        raise error

    reported: list[StartFailure] = []
    report = SimpleNamespace(result=lambda timeout_s: None)
    replica = SimpleNamespace(
        _gateway_config=SimpleNamespace(gateway_id="gw-1", opens_when_attached=True),
        _log_path=Path("gw.log"),
        _directory=SimpleNamespace(report_failure=lambda failure: reported.append(failure) or report),
        _start_gateway=start,
    )
    replica._run = functools.partial(GatewayReplica._run, replica)
    replica._failure = functools.partial(GatewayReplica._failure, replica)
    with pytest.raises(FleetError, match="gateway: ") as raised:
        GatewayReplica._begin(replica)
    assert raised.value.__cause__ is error
    assert reported == [StartFailure("gw-1", kind, message, "gw.log")]
