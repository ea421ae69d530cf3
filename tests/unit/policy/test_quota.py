"""The limits of one key, worked by hand, and what holds whatever comes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kervan.policy.quota import Grant, KeyMeter, Levels, Limits, counting_gateway


class Gateway:
    """Numbers its messages as a gateway does, and knows its streams."""

    def __init__(self, name: str, meter: KeyMeter) -> None:
        self.name, self.meter, self.held, self.number = name, meter, 0, 0

    def ask(self, now_s: float, *, tokens: int = 0, streams: int = 1) -> Grant:
        self.number += 1
        grant = self.meter.ask(
            self.name, now_s, requests=1, tokens=tokens, streams=streams, held=self.held, number=self.number
        )
        self.held += streams if grant.is_granted else 0
        return grant

    def settle(self, now_s: float, *, tokens: int = 0, streams: int = 1) -> Levels:
        self.number += 1
        self.held -= streams
        return self.meter.settle(self.name, now_s, requests=0, tokens=tokens, held=self.held, number=self.number)


def test_a_minutes_worth_may_come_at_once_and_the_rest_comes_evenly() -> None:
    gateway = Gateway("a", KeyMeter.new(Limits(requests_per_minute=3), 0.0))
    assert [gateway.ask(0.0).levels.requests for _ in range(3)] == [2, 1, 0]
    refused = gateway.ask(0.0)
    assert (refused.reason, refused.retry_after_s) == ("requests", 20)  # one in 60 / 3 s
    assert refused.levels.requests_reset_s == 60
    assert not gateway.ask(19.0).is_granted
    assert gateway.ask(20.0).is_granted
    assert gateway.ask(1000.0).levels.requests == 2  # it holds no more than a minute's worth


def test_what_was_reserved_and_not_used_comes_back_and_what_was_used_beyond_is_owed() -> None:
    gateway = Gateway("a", KeyMeter.new(Limits(tokens_per_minute=600), 0.0))
    assert gateway.ask(0.0, tokens=500).levels.tokens == 100
    refused = gateway.ask(0.0, tokens=300)
    assert (refused.reason, refused.retry_after_s) == ("tokens", 20)  # 200 of them at 10 a second
    assert gateway.settle(0.0, tokens=450).tokens == 550
    assert gateway.ask(0.0, tokens=50).levels.tokens == 500
    assert gateway.settle(0.0, tokens=-700).tokens == -200
    assert gateway.ask(0.0, tokens=100).retry_after_s == 30


def test_a_request_that_is_above_the_limit_waits_until_all_is_there() -> None:
    gateway = Gateway("a", KeyMeter.new(Limits(tokens_per_minute=60), 0.0))
    assert gateway.ask(0.0, tokens=100).levels.tokens == -40
    assert gateway.ask(0.0, tokens=100).retry_after_s == 100


def test_streams_of_all_gateways_count_together_until_they_end() -> None:
    meter = KeyMeter.new(Limits(streams=3), 0.0)
    a, b = Gateway("a", meter), Gateway("b", meter)
    assert a.ask(0.0, streams=2).is_granted
    assert b.ask(0.0).is_granted
    assert (b.ask(0.0).reason, b.ask(0.0, streams=4).reason) == ("streams", "too_large")
    a.settle(0.0, streams=1)
    assert b.ask(0.0).is_granted
    assert meter.num_streams == 3
    meter.keep_gateways({"b"})  # a is gone
    assert meter.num_streams == 2


def test_a_message_that_comes_late_takes_no_place_that_a_later_one_has_told_of() -> None:
    meter = KeyMeter.new(Limits(streams=2), 0.0)
    assert meter.ask("a", 0.0, requests=1, tokens=0, streams=1, held=1, number=2).is_granted  # knows of the first
    assert meter.ask("a", 0.0, requests=1, tokens=0, streams=1, held=0, number=1).is_granted
    assert meter.num_streams == 2
    meter.settle("a", 0.0, requests=0, tokens=0, held=0, number=4)
    meter.settle("a", 0.0, requests=0, tokens=0, held=1, number=3)
    assert meter.num_streams == 0


def test_other_limits_hold_at_once_and_forget_nothing() -> None:
    meter = KeyMeter.new(Limits(requests_per_minute=10), 0.0)
    gateway = Gateway("a", meter)
    for _ in range(8):
        gateway.ask(0.0)
    meter.change(Limits(requests_per_minute=20), 0.0)
    assert meter.levels(0.0).requests == 12
    meter.change(Limits(requests_per_minute=5), 0.0)
    assert meter.levels(0.0).requests == -3
    meter.change(Limits(), 0.0)
    assert gateway.ask(0.0).is_granted


def test_who_counts_next_begins_with_what_was_seen_last() -> None:
    limits = Limits(requests_per_minute=60, tokens_per_minute=600)
    seen = Levels(requests=5, requests_reset_s=55, tokens=-100, tokens_reset_s=70)
    meter = KeyMeter.new(limits, 100.0, seen, seen_age_s=10.0)
    assert meter.levels(100.0) == Levels(15, 45, 0, 60)


def test_a_share_of_a_limit_is_at_least_one_and_none_of_none() -> None:
    assert Limits(10, 0, 2).share(4) == Limits(2, 0, 1)


@given(
    limit=st.integers(1, 50),
    steps=st.lists(st.tuples(st.floats(0, 30), st.sampled_from("abc")), max_size=150),
)
def test_no_minute_has_more_than_the_limit_and_what_may_come_at_once(
    limit: int, steps: list[tuple[float, str]]
) -> None:
    meter = KeyMeter.new(Limits(requests_per_minute=limit), 0.0)
    gateways = {name: Gateway(name, meter) for name in "abc"}
    now_s, granted = 0.0, []
    for wait_s, name in steps:
        now_s += wait_s
        if gateways[name].ask(now_s).is_granted:
            granted.append(now_s)
            gateways[name].settle(now_s)
    for begin_s in granted:
        assert sum(begin_s <= at_s < begin_s + 60 for at_s in granted) <= 2 * limit


@given(
    limit=st.integers(1, 1000),
    asked=st.lists(st.tuples(st.floats(0, 20), st.integers(0, 1200), st.floats(0, 2)), max_size=100),
)
def test_tokens_owe_no_more_than_was_used_beyond_reservations(
    limit: int, asked: list[tuple[float, int, float]]
) -> None:
    gateway = Gateway("a", KeyMeter.new(Limits(tokens_per_minute=limit), 0.0))
    now_s, beyond, used_in_all = 0.0, 0.0, 0.0
    for wait_s, wanted, share in asked:
        now_s += wait_s
        tokens = min(wanted, limit)
        if gateway.ask(now_s, tokens=tokens).is_granted:
            used = int(share * tokens)
            beyond += max(0, used - tokens)
            used_in_all += used
            gateway.settle(now_s, tokens=tokens - used)
    assert used_in_all <= limit + limit * now_s / 60 + beyond + 1e-6


@pytest.mark.parametrize("gone", ["gw-1", "gw-2", "gw-3"])
def test_when_a_gateway_goes_only_its_keys_are_counted_elsewhere(gone: str) -> None:
    gateways = ["gw-1", "gw-2", "gw-3"]
    keys = [f"key-{number}" for number in range(300)]
    before = {key: counting_gateway(key, gateways) for key in keys}
    after = {key: counting_gateway(key, [g for g in reversed(gateways) if g != gone]) for key in keys}
    assert all(before[key] == after[key] for key in keys if before[key] != gone)
    assert all(70 < list(before.values()).count(gateway) < 130 for gateway in gateways)
