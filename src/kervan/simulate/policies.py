"""The policies of `--policy`, by name, for a fleet that is to be simulated."""

import difflib
from collections.abc import Callable, Mapping

from kervan.errors import ConfigError
from kervan.policy.autoscale.state import Policy
from kervan.simulate.fixed import FixedNumber
from kervan.simulate.setup import FleetSetup

Maker = Callable[[FleetSetup, int], Policy]


def _fixed(setup: FleetSetup, seed: int) -> Policy:
    return FixedNumber()


MAKERS: Mapping[str, Maker] = {"fixed": _fixed}
"""Each is given the fleet and the seed of the run: the oracle looks at its arrivals."""


def check(name: str) -> None:
    """Raises: ConfigError for a name that is no policy."""
    kind, colon, count = name.partition(":")
    if kind == "fixed" and colon:
        if not (count.isascii() and count.isdecimal() and len(count) <= 4):
            raise ConfigError(f"--policy {name!r}: {count!r} is not a number of replicas; write for example fixed:8")
        return
    if name not in MAKERS:
        near = difflib.get_close_matches(name, MAKERS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(MAKERS)} and fixed:N"
        raise ConfigError(f"--policy {name!r} is no policy; {hint}")


def make(name: str, setup: FleetSetup, seed: int) -> Policy:
    """The policy of a name that `check` has let pass."""
    if name.startswith("fixed:"):
        return FixedNumber(int(name.removeprefix("fixed:")))
    return MAKERS[name](setup, seed)
