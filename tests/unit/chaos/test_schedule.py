"""When something is disturbed, and whom it hits."""

from kervan.chaos.schedule import Moment, choose, moments


def test_each_kind_comes_once_in_its_period() -> None:
    # kills at 10, 20, 30 (not at 35 and not at 40); drains at 15 and 30, at which the order is by name
    found = moments({"kill": 10.0, "drain": 15.0}, 35.0)
    assert found == [
        Moment(10.0, "kill"),
        Moment(15.0, "drain"),
        Moment(20.0, "kill"),
        Moment(30.0, "drain"),
        Moment(30.0, "kill"),
    ]
    assert moments({"kill": 10.0}, 10.0) == []


def test_a_victim_needs_others_that_are_ready() -> None:
    assert choose({"a", "b"}, min_ready=2, seed=0, number=0) is None
    assert choose({"a", "b", "c"}, min_ready=2, seed=0, number=0) in {"a", "b", "c"}
    assert choose(set(), min_ready=0, seed=0, number=0) is None
    assert choose({"a"}, min_ready=0, seed=0, number=0) == "a"


def test_the_same_seed_gives_the_same_victims_and_hits_all() -> None:
    ready = ["d", "b", "a", "c"]
    victims = [choose(ready, min_ready=1, seed=7, number=n) for n in range(50)]
    assert victims == [choose(sorted(ready), min_ready=1, seed=7, number=n) for n in range(50)]
    assert set(victims) == set(ready)
