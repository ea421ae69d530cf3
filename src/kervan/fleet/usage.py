"""What API keys have used: counted by gateways when streams end, and added up for the whole fleet.

A stream is counted where it began, once, however often it moves. One that its client comes back to is counted for what
is generated after that.
"""

from collections.abc import Callable, Mapping
from contextvars import ContextVar

import msgspec

from kervan.fleet.stream import Stream

KEEP_GATEWAY_S = 3600.0  # before what one that is gone has counted is added to the rest

UNKNOWN = "(unknown)"  # requests whose key is none of the fleet's
ANYBODY = "(anybody)"  # requests to a fleet without keys


class KeyUsage(msgspec.Struct, omit_defaults=True):
    """Counts since a gateway's start, or the fleet's. `cached_tokens` of `prompt_tokens` were in a prefix cache.

    `rejected`: requests that were not worked on, because of the key. `streams`: open now.
    """

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    rejected: int = 0
    streams: int = 0

    def add(self, other: "KeyUsage") -> None:
        """Count those of `other` too."""
        for name in self.__struct_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


UsageByModel = dict[str, KeyUsage]
"""By model, or adapter."""
UsageByKey = dict[str, UsageByModel]


class Charge:
    """What the streams of one request cost whoever sent it. `spent` is called with the usage of each that has ended."""

    def __init__(self, spent: Callable[[str, KeyUsage], None]) -> None:
        self.model: str | None = None
        self._spent = spent
        self._prompts: set[str] = set()

    def opened(self, stream: Stream) -> None:
        """A stream of the request has come."""
        stream.charge = self
        self.model = stream.model

    def ended(self, stream: Stream) -> None:
        """It is over, or is left. Choices of one prompt share it: it counts once."""
        stream.charge = None
        usage = KeyUsage(generated_tokens=max(0, len(stream.generated) - stream.num_replayed))
        prompt = _prompt_of(stream.request_id)
        if not stream.num_replayed and prompt not in self._prompts:
            self._prompts.add(prompt)
            usage.prompt_tokens, usage.cached_tokens = stream.prompt_tokens, stream.cached_tokens
        self._spent(stream.model, usage)


def _prompt_of(request_id: str) -> str:
    """vLLM names the choices of a prompt `0_ID`, `1_ID`."""
    number, underscore, rest = request_id.partition("_")
    return rest if underscore and number.isdecimal() else request_id


current_charge: ContextVar[Charge | None] = ContextVar("current_charge", default=None)


class FleetUsage(msgspec.Struct):
    """What all gateways have counted since `since_s` (Unix time). `ended`: those that are gone for long."""

    since_s: float
    ended: UsageByKey = {}
    gateways: dict[str, UsageByKey] = {}

    def total(self) -> UsageByKey:
        """All of it."""
        total: UsageByKey = {}
        for usage in (self.ended, *self.gateways.values()):
            add(total, usage)
        return total


class Ledger:
    """Adds up the counts of gateways, which tell them from their own start; `stored`: of the ledger before this one."""

    def __init__(self, stored: FleetUsage) -> None:
        self.usage = stored
        self._told_s: dict[str, float] = {}
        self.is_changed = False

    def tell(self, gateway_id: str, usage: UsageByKey, now_s: float) -> None:
        """A gateway's counts so far."""
        self._told_s[gateway_id] = now_s
        if usage and self.usage.gateways.get(gateway_id) != usage:
            self.usage.gateways[gateway_id] = usage
            self.is_changed = True

    def look(self, now_s: float, present: set[str]) -> None:
        """Gateways that are not `present` have no streams; their counts stay."""
        for gateway_id, usage in list(self.usage.gateways.items()):
            told_s = self._told_s.setdefault(gateway_id, now_s)
            if gateway_id in present:
                continue
            for counted in (counted for models in usage.values() for counted in models.values()):
                self.is_changed |= counted.streams != 0
                counted.streams = 0
            if now_s - told_s > KEEP_GATEWAY_S:
                add(self.usage.ended, self.usage.gateways.pop(gateway_id))
                del self._told_s[gateway_id]
                self.is_changed = True


def add(total: UsageByKey, more: Mapping[str, UsageByModel]) -> None:
    """Count `more` in `total` too."""
    for key, models in more.items():
        for model, usage in models.items():
            total.setdefault(key, {}).setdefault(model, KeyUsage()).add(usage)
