"""What a gateway's process and the process that started it tell each other, as JSON lines (`kervan.fleet.control`)."""

import msgspec

from kervan.fleet.directory import GatewayEntry, Snapshot
from kervan.gateway.server import GatewayConfig
from kervan.gateway.shared_port import Neighbour


class GatewaySpec(msgspec.Struct, frozen=True):
    """The first message to a gateway's process. `neighbours`: the other fleets on its port."""

    config: GatewayConfig
    neighbours: list[Neighbour]


class Update(msgspec.Struct, frozen=True, tag="update"):
    """The directory has changed."""

    snapshot: Snapshot


class UpdateNeighbours(msgspec.Struct, frozen=True, tag="neighbours"):
    """The other fleets on the port have changed."""

    neighbours: list[Neighbour]


class LoopPing(msgspec.Struct, frozen=True, tag="ping"):
    """To be answered by its loop with a `LoopPong` of this number."""

    number: int


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """Stop accepting, let open requests end, leave."""


class Opened(msgspec.Struct, frozen=True, tag="opened"):
    """Its port is open, unless it opens when vLLM's app answers."""


class Attached(msgspec.Struct, frozen=True, tag="attached"):
    """vLLM's app answers."""


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    """Sent every second: the gateway as the directory should list it."""

    entry: GatewayEntry


class LoopPong(msgspec.Struct, frozen=True, tag="pong"):
    """Its loop has come round to the `LoopPing` of this number."""

    number: int


class GatewayFailed(msgspec.Struct, frozen=True, tag="failed"):
    """It cannot answer, and why; `kind` names the class of the error."""

    kind: str
    message: str


Command = Update | UpdateNeighbours | LoopPing | Stop
Report = Opened | Attached | Beat | LoopPong | GatewayFailed
