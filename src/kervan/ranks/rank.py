"""What a rank is, and the words between it and the process that has started it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kervan.errors import ConfigError

STORE = "KERVAN_RANK_STORE"


@dataclass(frozen=True, slots=True)
class Nodes:
    """The hosts that take part, each with its own command: how many, which one this is, and where they meet.

    `rendezvous`: HOST:PORT of node 0, as torchrun's `--rdzv-endpoint`; not needed for one node.
    """

    count: int = 1
    number: int = 0
    rendezvous: str = ""

    def __post_init__(self) -> None:
        """Raises: ConfigError."""
        if not 0 <= self.number < self.count:
            raise ConfigError(
                f"--node-rank {self.number} is not within 0 to {self.count - 1}, and --nodes is {self.count}; number "
                f"the nodes from 0 to {self.count - 1}"
            )
        host, _, port = self.rendezvous.rpartition(":")
        if self.count > 1 and not (host and port.isdecimal() and 0 < int(port) < 65536):
            raise ConfigError(
                f"--nodes {self.count} needs --rendezvous HOST:PORT, a free port of node 0 that all nodes reach, and "
                f"was given {self.rendezvous!r}; write for example --rendezvous 10.0.0.1:29500"
            )


@dataclass(frozen=True, slots=True)
class Rank:
    """Who a process is: its number among all, and among those of its node (the GPU that it takes).

    `store`: a file, new for this group, by which its ranks find each other; empty: by torchrun's environment.
    """

    number: int
    of: int
    local: int
    local_of: int
    store: str = ""


Keep = Callable[[Any], None]
# Called in the process of a rank with what it is to do; `keep` sends a row back.
Work = Callable[[Rank, Any, Keep], None]


@dataclass(frozen=True, slots=True)
class Job:
    """What a rank gets to do."""

    work: Work
    arguments: Any


@dataclass(frozen=True, slots=True)
class Joined:
    """The first word of a rank."""

    number: int
    of: int
    pid: int

    def __str__(self) -> str:
        return f"rank {self.number} of {self.of}"


@dataclass(frozen=True, slots=True)
class Doing:
    """What a rank does from now on, for the message when it does not end; it is no row.

    `limit_s`: how long it may take; None: until the time of all is over.
    """

    what: str
    limit_s: float | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The last word of a rank that raised. `is_config`: what was asked for is wrong."""

    message: str
    is_config: bool = False


@dataclass(frozen=True, slots=True)
class Ended:
    """The last word of a rank whose work is done."""


def stack_path(address: str, number: int) -> Path:
    """Where a rank writes its stack when it is sent SIGUSR2; `address`: of the socket that it reports to."""
    return Path(address).with_name(f"stack-{number}")
