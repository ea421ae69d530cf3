"""What a gateway records of itself, and for whom."""

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest

from kervan.errors import ConfigError
from kervan.gateway import ranges
from kervan.gateway.remembered import RequestMemory


@pytest.mark.parametrize("query", [b"", b"for_s=", b"for_s=ten", b"for_s=0", b"for_s=601", b"for_s=nan", b"for_s=-1"])
def test_a_time_that_is_none_is_refused(query: bytes) -> None:
    with pytest.raises(ConfigError, match=r"outside 0\.\.600 s; write for example for_s=10"):
        ranges.parse_ask(query)


def test_ranges_are_on_unless_they_are_not_wanted() -> None:
    assert ranges.parse_ask(b"for_s=2.5") == ranges.RangesAsk(2.5, True)
    assert ranges.parse_ask(b"for_s=2&has_ranges=0") == ranges.RangesAsk(2.0, False)


def gateway() -> tuple[Any, Any]:
    """A fleet client and vLLM's client, as much of them as is wrapped."""

    class Anything:
        num_tokens = 3
        replica_id = "r-1"

        def _choose(self) -> str:
            time.sleep(0.002)
            return "chosen"

        def decode(self) -> None:
            raise ValueError("as it was")

        async def tokenize_prompt_async(self) -> str:
            await asyncio.sleep(0.002)
            return "tokens"

        def generated_tokens(self, replica_id: str) -> int:
            return self.num_tokens

    fleet = Anything()
    fleet._placements, fleet.codec, fleet.links, fleet.tallies = Anything(), Anything(), [fleet], {"r-1": 0}  # type: ignore[attr-defined]
    return fleet, SimpleNamespace(output_processor=Anything(), renderer=Anything())


async def test_what_is_called_meanwhile_is_counted_and_kept_and_all_is_as_before() -> None:
    fleet, engine = gateway()
    recording = asyncio.create_task(ranges.record(ranges.RangesAsk(0.1), fleet, engine, None, gateway_id="gw-1"))
    await asyncio.sleep(0.02)
    assert fleet._placements._choose() == "chosen" and await engine.renderer.tokenize_prompt_async() == "tokens"
    with pytest.raises(ValueError, match="as it was"):
        fleet.codec.decode()
    fleet.num_tokens = 10
    found = await recording
    assert (found.gateway, found.tokens, found.requests) == ("gw-1", 7, [])
    calls = {name: total.calls for name, total in found.totals.items() if total.calls}
    assert calls == {"routing": 1, "tokenisation": 1, "decode outputs": 1}
    assert found.totals["routing"].seconds >= 0.002 and found.totals["tokenisation"].seconds >= 0.002
    assert all(found.begin_ns <= begin <= end <= found.end_ns for _, begin, end in found.spans)
    for owner in (fleet._placements, fleet.codec, engine.output_processor, engine.renderer):
        assert vars(owner).keys() <= {"_placements", "codec", "links", "tallies", "num_tokens"}


async def test_nothing_is_wrapped_without_ranges() -> None:
    fleet, engine = gateway()
    recording = asyncio.create_task(ranges.record(ranges.RangesAsk(0.05, False), fleet, engine, None, gateway_id="g"))
    await asyncio.sleep(0.01)
    assert "_choose" not in vars(fleet._placements)
    assert (await recording).totals == {}


async def test_requests_that_were_in_flight_are_told_and_earlier_ones_are_not() -> None:
    memory, scope = RequestMemory(10), {"path": "/v1/completions", "headers": []}
    with memory.begin(scope, time.monotonic()):
        pass
    await asyncio.sleep(0.01)
    fleet, engine = gateway()
    with memory.begin({**scope, "headers": [(b"x-request-id", b"mine")]}, time.monotonic()):
        found = await ranges.record(ranges.RangesAsk(0.01), fleet, engine, memory, gateway_id="g")
    assert [timed.request.client_id for timed in found.requests] == ["mine"]
    assert memory.since(0.0, 1)[0].client_id == "mine" and len(memory.since(0.0, 5)) == 2
