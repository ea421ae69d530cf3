"""What a result says of itself: doubts and notes."""

from typing import Any

import pytest

from kervan.bench.drive import Action, Outcome
from kervan.bench.endpoint import Probe
from kervan.bench.load import Endpoint, Load
from kervan.bench.prefix_reuse import PrefixReuse
from kervan.bench.reconcile import Reconciliation
from kervan.bench.result import Result
from kervan.bench.sketch import Sketch
from kervan.bench.tally import RequestTally
from kervan.config.workload import Slo


def result(
    *, gaps_s: float = 0.01, tpot_s: float = 0.01, actions: Any = (), gave_up: bool = False, **counts: Any
) -> Result:
    tally = RequestTally(0.0)
    for name, value in {"ok": 10, "first_send_s": 0.0, "last_end_s": 5.0, **counts}.items():
        setattr(tally, name, value)
    for block in tally._blocks:
        block["gap_s"].add(gaps_s)
        block["tpot_s"].add(tpot_s)
    outcome = Outcome(tally, 1, 0.0, 5.0, 0.0, Sketch(), "asyncio", [], gave_up=gave_up, missed_actions=list(actions))
    load = Load(streams=2, duration_s=5)
    return Result(Endpoint(url="http://s"), Probe(), load, Slo(), outcome, None, Reconciliation("unavailable"))


def test_what_is_cached_of_an_earlier_run_is_told() -> None:
    """300 of 1,000 prompt tokens were cached, and the run repeats 100."""
    reuse = PrefixReuse(num_told=9, prompt_tokens=1000, cached_tokens=300, reusable_tokens=100)
    (note,) = result(prefix_reuse=reuse).notes()
    assert note.startswith("the prefix cache had 200 prompt tokens more than this run repeats")
    reuse.cached_tokens = 110
    assert result(prefix_reuse=reuse).notes() == []


def test_nothing_to_say() -> None:
    good = result(errors={"http_503": 0, "truncated": 9})
    assert (good.doubts(), good.notes(), good.num_refused) == ([], [], 0)


@pytest.mark.parametrize(
    ("given", "doubt"),
    [
        ({"ok": 0, "errors": {"http_503": 3}}, "no request succeeded (3 http_503)"),
        ({"ok": 0}, "no request succeeded (nothing was sent)"),
        (
            {"ok": 0, "errors": {"http_404": 9}, "messages": {"http_404": ["no\nmodel m"]}, "gave_up": True},
            "ended early, as no request can succeed (9 http_404): no model m",
        ),
        (
            {"ok": 10, "errors": {"http_503": 20, "refused": 5, "timeout": 5}},
            "25 of 40 requests (62%) were refused (20 http_503, 5 refused, 5 timeout), and the times are those of the "
            "others; send less, or give the server more replicas",
        ),
        (
            {"errors": {}, "sent_away": 2, "longest_retry_after_s": 60.0},
            "2 streams ended early: the server said to come back in 60 s (Retry-After), after the end of the load; "
            "try again then",
        ),
        (
            {"actions": [Action(9.0, "kill")]},
            "--at '9s kill' was not run: the load ended after 5.00 s; use a longer --duration",
        ),
    ],
)
def test_doubts(given: dict[str, Any], doubt: str) -> None:
    found = result(**given)
    assert found.doubts() == [doubt]
    assert found.client_doubts() == []
    assert found.to_dict()["valid"] is False


@pytest.mark.parametrize(
    ("given", "begin"),
    [
        ({"gaps_s": 0.0, "tpot_s": 358e-6}, "at least half of the chunks came together with the one before"),
        ({"gaps_s": 0.0, "tpot_s": 0.0}, "the answers came in one piece"),
        (
            {"told_to_wait": 1, "longest_retry_after_s": 2.0},
            "1 response asked to come back after up to 2 s (Retry-After)",
        ),
    ],
)
def test_notes(given: dict[str, Any], begin: str) -> None:
    (note,) = result(**given).notes()
    assert note.startswith(begin)
    assert result(**given).doubts() == []
