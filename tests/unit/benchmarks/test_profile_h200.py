"""Tokens per second around a profile, of streams that prefill together and decode together."""

import itertools
from collections.abc import Callable

import profile_h200
import pytest

ROUND_S, STREAMS = 12.0, 256
TOKENS = STREAMS * 256


def lockstep(begin_s: float) -> Callable[[], dict[str, float]]:
    """Counters of streams that prefill for 7 s of each round, then decode for 5 and end together; read every second."""
    seconds = itertools.count()

    def counted() -> dict[str, float]:
        at_s = begin_s + next(seconds)
        rounds, in_round_s = divmod(at_s, ROUND_S)
        return {"at_s": at_s, "ended": rounds * STREAMS, "tokens": (rounds + max(0.0, in_round_s - 7) / 5) * TOKENS}

    return counted


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_h200.time, "sleep", lambda _: None)


@pytest.mark.parametrize("begin_s", [0.0, 3.0, 9.0])
@pytest.mark.parametrize(("least_s", "rounds"), [(8.0, 1), (12.0, 1), (20.0, 2)])
def test_tokens_are_counted_from_the_end_of_a_round_to_that_of_another(
    begin_s: float, least_s: float, rounds: int
) -> None:
    counted = lockstep(begin_s)
    first = profile_h200.next_round(counted, STREAMS, zero=0.0)
    second = profile_h200.next_round(counted, STREAMS, zero=0.0, not_before_s=first["at_s"] + least_s)
    found = profile_h200.between(first, second, STREAMS)
    assert found == {"tok_s": pytest.approx(TOKENS / ROUND_S), "rounds": rounds, "seconds": rounds * ROUND_S}


def test_a_load_that_ends_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.count()
    monkeypatch.setattr(profile_h200.time, "monotonic", lambda: float(next(seconds)))
    with pytest.raises(TimeoutError, match="no round of 256 streams ended within 120 s"):
        profile_h200.next_round(lambda: {"at_s": 1.0, "ended": 3.0, "tokens": 0.0}, STREAMS, zero=0.0)
