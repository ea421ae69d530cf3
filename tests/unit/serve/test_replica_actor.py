"""What an engine process has of its actor's environment, and of the fleet's; how a replica ends."""

import functools
import threading
from types import SimpleNamespace

from kervan.errors import FleetError
from kervan.serve.replica_actor import EngineReplica


async def test_a_replica_ends_although_its_directory_is_gone() -> None:
    """`kervan down` ends the directory when Serve takes too long to end the replicas."""

    async def remove(_: str) -> None:
        raise FleetError("the directory does not answer")

    said: list[str] = []
    process = SimpleNamespace(ready=None, kill=lambda: said.append("kill"), stop=lambda _: said.append("stop"))
    replica = SimpleNamespace(
        _id="a", _process=process, _directory=SimpleNamespace(remove=remove), _is_draining=False,
        _drained=threading.Event(), _config=SimpleNamespace(drain_timeout_s=1.0),
    )  # fmt: skip
    replica._drain = functools.partial(EngineReplica._drain, replica)
    await EngineReplica.__del__(replica)
    assert said == ["kill", "stop"]
    assert replica._drained.is_set()
