"""What the API keys of a fleet have used: what `kervan usage` shows."""

from dataclasses import dataclass
from typing import Any

import msgspec

from kervan.fleet.usage import KeyUsage, UsageByKey
from kervan.serve.attach import attach


@dataclass(frozen=True, slots=True)
class ToldUsage:
    """Since `since_s` (Unix time). `keys`: names of those that the fleet has now, which may have used nothing."""

    since_s: float
    usage: UsageByKey
    keys: tuple[str, ...]

    def by_key(self) -> list[dict[str, Any]]:
        """A row for each key, those of the fleet in its order, then others that have used something."""
        names = dict.fromkeys([*self.keys, *sorted(self.usage)])
        return [_row(name, self.usage.get(name, {}).values()) for name in names]

    def by_model(self) -> list[dict[str, Any]]:
        """A row for each model or adapter."""
        names = sorted({model for models in self.usage.values() for model in models})
        return [_row(name, (models[name] for models in self.usage.values() if name in models)) for name in names]


def usage(name: str, address: str | None) -> ToldUsage:
    """Of the whole fleet. Raises: FleetError when it, or its directory, does not answer."""
    directory = attach(name, address)
    counted, table = directory.usage(), directory.keys()
    told = counted.result()
    return ToldUsage(told.since_s, told.total(), tuple(entry.name for entry in table.result().entries))


def _row(name: str, usages: Any) -> dict[str, Any]:
    total = KeyUsage()
    for one in usages:
        total.add(one)
    return {"name": name, **{field: getattr(total, field) for field in msgspec.structs.asdict(total)}}
