"""A spot market from a few numbers: zones that are short of nodes now and then, and often together.

Each zone is whole or short, and so is its region; a zone has all of its nodes while both are whole. How long each stays
so is drawn from a Weibull distribution of shape `SHAPE` < 1, so that what has just come is the likeliest to go: in 45
days of nine AWS zones half of the times ended within 0.3 to 1.4 hours, while the mean was 0.7 to 10.4 hours. When a
zone becomes short, a large share of its nodes goes at once (`LOST`), the youngest first: in zones of 16 nodes 7 to 11
went per event. Nodes are not lost one by one, so fleets that count on independent losses are wrong about this market.

Source of the numbers: the availability traces of SkyPilot's spot study (nine zones, V100, 45 days), by our own count.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from kervan.config.node_trace import NodeChange, NodeTrace, Word
from kervan.errors import ConfigError
from kervan.units import parse_duration_s, parse_share

SHAPE = 0.6
LOST = (0.45, 1.0)
EXAMPLE = "zones=3,nodes=4,availability=0.7,up=3h,correlation=0.4"
MAX_NODES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class MarketModel:
    """`zones` of a region with `nodes` each. `availability`: share of the time in which a zone is whole; `up_s`: for
    how long at a time, on average. `correlation`: between two zones of being whole.
    """

    zones: int
    nodes: int
    availability: float = 0.7
    up_s: float = 3 * 3600.0
    correlation: float = 0.43

    @property
    def num_nodes(self) -> int:
        """Of all zones, at most."""
        return self.zones * self.nodes


def parse_market(text: str, subject: str = "--spot") -> MarketModel:
    """The market of `zones=3,nodes=4`, with more where the defaults do not fit.

    Raises: ConfigError, which names `subject`.
    """
    given: dict[str, str] = {}
    for item in text.split(","):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or key not in ("zones", "nodes", "availability", "up", "correlation"):
            raise ConfigError(
                f"{subject} {text!r}: {item!r} is none of zones=, nodes=, availability=, up= and "
                f"correlation=; write {EXAMPLE}, or give a file that exists"
            )
        if key in given:
            raise ConfigError(f"{subject} {text!r} gives {key} twice; give it once")
        given[key] = value
    counts = {}
    for key in ("zones", "nodes"):
        value = given.get(key, "1" if key == "zones" else "")
        if not (value.isascii() and value.isdecimal() and 1 <= int(value[:6]) <= MAX_NODES):
            raise ConfigError(f"{subject} {text!r}: {key}={value!r} is not a whole number from 1; write {EXAMPLE}")
        counts[key] = int(value)
    availability = parse_share(given.get("availability", "0.7"), f"{subject} availability")
    correlation = parse_share(given.get("correlation", "0.43"), f"{subject} correlation")
    up_s = parse_duration_s(given.get("up", "3h"), f"{subject} up")
    if not 0 < availability < 1:
        raise ConfigError(f"{subject} availability={availability:g} is not between 0 and 1; write availability=0.7")
    if correlation >= 1:
        raise ConfigError(f"{subject} correlation={correlation:g} is one zone; write zones=1, or correlation=0.4")
    if not 60 <= up_s <= 1e8:
        raise ConfigError(f"{subject} up={given['up']} is not from a minute to three years; write up=3h")
    return MarketModel(
        zones=counts["zones"], nodes=counts["nodes"], availability=availability, up_s=up_s, correlation=correlation
    )


def generate(model: MarketModel, duration_s: float, seed: int) -> NodeTrace:
    """What happens in the market in a time; nodes are named `zone/number`."""
    share = model.availability
    own_share = share + model.correlation * (1 - share)
    region_share = share / own_share
    # The zone is whole until the first of both is short: rates of ending add up. Each gets its part of them.
    own_part = (1 - own_share) / max(1e-9, (1 - own_share) + (1 - region_share))
    region_up_s, own_up_s = model.up_s / max(1e-9, 1 - own_part), model.up_s / max(1e-9, own_part)
    region = _shortages(random.Random(f"market {seed} region"), region_share, region_up_s, duration_s)
    events: list[tuple[float, Word, tuple[str, ...]]] = []
    for zone in range(model.zones):
        rng = random.Random(f"market {seed} zone {zone}")
        own = _shortages(rng, own_share, own_up_s, duration_s)
        losses = [(begin_s, end_s, rng.uniform(*LOST)) for begin_s, end_s in sorted([*region, *own])]
        events += _nodes(chr(ord("a") + zone % 26) + str(zone // 26 or ""), model.nodes, losses, duration_s)
    merged: dict[tuple[float, Word], list[str]] = {}
    for at_s, word, names in sorted(events, key=lambda event: (event[0], event[1] == "add")):
        merged.setdefault((at_s, word), []).extend(names)
    changes = tuple(NodeChange(at_s, word, tuple(names)) for (at_s, word), names in merged.items())
    return NodeTrace(changes, duration_s)


def zone_of(node: str) -> str:
    """The zone of a node that `generate` has named; empty for others."""
    zone, slash, _ = node.partition("/")
    return zone if slash else ""


def _shortages(rng: random.Random, share: float, up_s: float, duration_s: float) -> list[tuple[float, float]]:
    """When something that is whole for a share of the time is not. It begins somewhere in its life."""
    if share >= 1 - 1e-9:
        return []
    down_s = up_s * (1 - share) / share
    scale = 1 / math.gamma(1 + 1 / SHAPE)
    # Long before the beginning, so that it is as likely whole then as at any other time.
    at_s, is_up, found = -8 * (up_s + down_s), rng.random() < share, []
    while at_s < duration_s:
        length_s = rng.weibullvariate(scale * (up_s if is_up else down_s), SHAPE)
        if not is_up and at_s + length_s > 0:
            found.append((max(0.0, at_s), at_s + length_s))
        at_s += length_s
        is_up = not is_up
    return found


def _nodes(
    zone: str, most: int, losses: list[tuple[float, float, float]], duration_s: float
) -> Iterator[tuple[float, Word, tuple[str, ...]]]:
    """When nodes of a zone come and go, the youngest going first. `losses`: begin, end, and the share that is gone."""
    moments = sorted({0.0, *(m for begin_s, end_s, _ in losses for m in (begin_s, end_s) if m < duration_s)})
    there: list[str] = []
    number = 0
    for at_s in moments:
        lost = max((share for begin_s, end_s, share in losses if begin_s <= at_s < end_s), default=0.0)
        count = most - math.ceil(lost * most)
        if count < len(there):
            yield at_s, "remove", tuple(there[count:])
            there = there[:count]
        elif count > len(there):
            names = tuple(f"{zone}/{number + place}" for place in range(count - len(there)))
            number += len(names)
            there += names
            yield at_s, "add", names
