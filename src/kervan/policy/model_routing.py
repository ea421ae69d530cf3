"""Which of the fleets on one port answers a request: the one it names, or else the one that has its model."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PortFleet:
    """One fleet of a port. `models`: names under which clients may ask for it. `has_keys`: it wants an API key."""

    name: str
    models: tuple[str, ...]
    has_keys: bool = False


@dataclass(frozen=True, slots=True)
class Route:
    """The fleet that answers; with None, `status` and `reason` are the answer."""

    fleet: str | None
    status: int = 200
    reason: str = ""
    param: str | None = None


def owners(fleets: Sequence[PortFleet]) -> dict[str, str]:
    """Model name -> fleet. Of several with one name (adapters loaded at run time) the first by name has it."""
    owner_of: dict[str, str] = {}
    for fleet in sorted(fleets, key=lambda fleet: fleet.name):
        for model in fleet.models:
            owner_of.setdefault(model, fleet.name)
    return owner_of


def decide(fleets: Sequence[PortFleet], *, own: str, model: str | None, fleet: str | None, needs_model: bool) -> Route:
    """Where a request goes that names this model and this fleet, either of which may be None.

    Without both, it goes to `own`, the fleet whose gateway has it, only if any fleet will do (`needs_model` False):
    the kernel chose that gateway by chance.
    """
    if fleet is not None:
        if any(listed.name == fleet for listed in fleets):
            return Route(fleet)
        return Route(None, 404, f"no fleet {fleet!r} is on this port{_known(fleets, 'fleets')}", "fleet")
    if model is not None:
        owner = owners(fleets).get(model)
        if owner is not None:
            return Route(owner)
        return Route(None, 404, f"The model `{model}` does not exist{_known(fleets, 'models')}", "model")
    if needs_model:
        return Route(
            None,
            400,
            f"{len(fleets)} fleets share this port, and the request does not say which it is for: give the JSON field "
            f"`model`, or add ?fleet=NAME to the path{_known(fleets, 'models')}",
            "model",
        )
    return Route(own)


def _known(fleets: Sequence[PortFleet], what: str) -> str:
    """The names to choose from, unless one of the fleets tells them only to those who have its key."""
    if any(fleet.has_keys for fleet in fleets):
        return "; GET /v1/models lists what your API key opens" if what == "models" else ""
    names = sorted(owners(fleets)) if what == "models" else sorted(fleet.name for fleet in fleets)
    return f"; {what} here: {', '.join(names)}"


@dataclass(frozen=True, slots=True)
class GatewayCandidate:
    """A gateway of the fleet that shall answer. `is_near`: on the node of the gateway that asks."""

    url: str
    has_model: bool
    is_ready: bool
    is_near: bool


def in_order(gateways: Sequence[GatewayCandidate], turn: int) -> list[str]:
    """Addresses in the order in which to try them; the best ones take turns at being first.

    One that is not ready comes last, but it comes: it holds the request, or knows why it cannot.
    """

    def rank(gateway: GatewayCandidate) -> tuple[bool, bool, bool]:
        return not gateway.has_model, not gateway.is_ready, not gateway.is_near

    ranked = sorted(gateways, key=rank)
    best = [gateway for gateway in ranked if rank(gateway) == rank(ranked[0])]
    start = turn % len(best) if best else 0
    return [gateway.url for gateway in best[start:] + best[:start] + ranked[len(best) :]]
