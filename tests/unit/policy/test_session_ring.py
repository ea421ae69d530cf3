from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from kervan.policy.session_ring import SessionRing

NAMES = st.sets(st.text("abcdef", min_size=1, max_size=4), max_size=8)


def test_without_replicas_a_session_has_no_home() -> None:
    assert SessionRing([]).home("s") is None


@given(NAMES, st.text(max_size=5))
def test_every_gateway_finds_the_same_home(names: set[str], session: str) -> None:
    homes = {SessionRing(order).home(session) for order in (sorted(names), sorted(names, reverse=True))}
    assert len(homes) == 1
    assert homes <= (names or {None})


@given(NAMES, st.text("xyz", min_size=1, max_size=3))
def test_a_replica_that_comes_takes_its_own_sessions_and_moves_no_others(names: set[str], new: str) -> None:
    before, after = SessionRing(names), SessionRing(names | {new})
    for n in range(20):
        assert after.home(f"s{n}") in (before.home(f"s{n}"), new)


def test_sessions_spread_over_the_replicas() -> None:
    ring = SessionRing(f"r{n}" for n in range(8))
    counts = Counter(ring.home(f"session {n}") for n in range(4000))
    assert len(counts) == 8
    assert max(counts.values()) < 1.6 * 500
