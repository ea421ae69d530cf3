"""`kervan comm` with words that are wrong: one line, and nothing is started."""

import pytest
from click.testing import CliRunner

from kervan.cli import comm
from kervan.errors import ConfigError, KervanError


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("bench --op foo", "--op 'foo' is none of all_reduce, all_gather"),
        ("bench --bytes 8..4", "goes from 8 down to 4 bytes; write --bytes 4..8"),
        ("bench --mode lazy", "--mode 'lazy' is none of eager, graph"),
        ("bench --device cpu --ranks 65", "--ranks 65 is more than 64"),
        ("bench --device cpu --nodes 2", "needs --rendezvous HOST:PORT, a free port of node 0"),
        ("bench --device cpu --rendezvous here", "'here' is not HOST:PORT"),
        ("bench --device cpu --record /nonexistent/x.json", "directory /nonexistent does not exist"),
        (
            "doctor --device cpu --nodes 2 --rendezvous h:1 --node-rank 2",
            "--node-rank 2 is not within 0 to 1, and --nodes is 2",
        ),
    ],
)
def test_wrong_words_are_refused_with_the_fix(words: str, problem: str) -> None:
    done = CliRunner().invoke(comm.comm, words.split())
    assert isinstance(done.exception, ConfigError)
    assert problem in str(done.exception)


def test_sizes_that_do_not_fit_are_refused_before_a_rank_is_started() -> None:
    done = CliRunner().invoke(comm.comm, ["bench", "--device", "cpu", "--bytes", "100000GiB"])
    assert isinstance(done.exception, KervanError)
    assert "give at most" in str(done.exception)
