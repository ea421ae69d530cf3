"""Who takes part, and which of several ranks' failures is the cause; that ranks run is tests/contract's."""

import pytest

from kervan.errors import ConfigError, EngineError
from kervan.ranks.start import Failed, Nodes, _error


@pytest.mark.parametrize(
    ("count", "number", "rendezvous", "said"),
    [
        (2, 2, "host:29500", "number the nodes from 0 to 1"),
        (2, 0, "", "needs --rendezvous HOST:PORT"),
        (2, 0, "host:99999", "needs --rendezvous HOST:PORT"),
        (2, 0, ":29500", "needs --rendezvous HOST:PORT"),
    ],
)
def test_nodes_that_cannot_meet_are_refused(count: int, number: int, rendezvous: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Nodes(count, number, rendezvous)


def test_nodes_that_can() -> None:
    assert Nodes() == Nodes(1, 0, "")
    assert Nodes(2, 1, "10.0.0.1:29500").count == 2


def test_the_rank_that_went_first_is_the_cause_and_not_those_that_missed_it() -> None:
    lost = Failed("rank 0 of 2: RuntimeError: Read error: Connection reset by peer (all_reduce, line 1)")
    cause = Failed("rank 1 of 2: ValueError: no luck (work, line 2)")
    assert str(_error([lost, cause])) == cause.message
    assert str(_error([lost])) == lost.message
    assert type(_error([lost, Failed("--seq 3", is_config=True)])) is ConfigError
    assert type(_error([cause])) is EngineError
