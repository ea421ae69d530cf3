"""The search for the highest rate, against servers of known capacity."""

import random

import pytest

from kervan.bench.saturation import Search, Trial, TrialResult


def run_trial(trial: Trial, good_share: float, seed: int = 0, backlog: float = 0.0) -> tuple[str, int, float]:
    """(verdict, requests that had ended, seconds); `backlog`: share of the arrivals that do not end."""
    rng = random.Random(seed)
    good = ended = 0
    for second in range(1, 1000):
        for _ in range(round(trial.rate * (1 - backlog))):
            ended += 1
            good += rng.random() < good_share
        in_flight = round(trial.rate * backlog * second)
        verdict = trial.verdict(good=good, ended=ended, in_flight=in_flight, elapsed_s=second)
        if verdict != "open":
            return verdict, ended, second
    raise AssertionError("never decided")


@pytest.mark.parametrize(("share", "verdict"), [(0.995, "keeps"), (0.85, "breaks"), (0.0, "breaks"), (1.0, "keeps")])
def test_clear_cases_are_decided_early_and_rightly(share: float, verdict: str) -> None:
    for seed in range(30):
        found, ended, seconds = run_trial(Trial(20.0), share, seed)
        assert found == verdict
        assert ended >= 40
        assert 8 <= seconds < 60


def test_errors_are_as_rare_as_promised() -> None:
    wrong = sum(run_trial(Trial(20.0, max_s=1e9), 0.90, seed)[0] == "keeps" for seed in range(300))
    assert wrong <= 0.08 * 300
    wrong = sum(run_trial(Trial(20.0, max_s=1e9), 0.95, seed)[0] == "breaks" for seed in range(300))
    assert wrong <= 0.08 * 300


def test_a_growing_backlog_breaks_the_slo_though_what_ended_was_good() -> None:
    assert run_trial(Trial(20.0), 1.0, backlog=0.5)[0] == "breaks"
    assert run_trial(Trial(20.0), 1.0, backlog=0.02)[0] == "keeps"


def test_no_yes_before_requests_have_come_and_gone_several_times() -> None:
    """At 20 requests/s and 80 in flight a request takes 4 s: nothing is steady before 20 s."""
    trial = Trial(20.0)
    verdicts = {s: trial.verdict(good=20 * s, ended=20 * s, in_flight=80, elapsed_s=s) for s in range(1, 22)}
    assert verdicts[19] == "open"
    assert verdicts[20] == "keeps"


def test_a_server_that_answers_nothing_breaks_it() -> None:
    assert Trial(5.0).verdict(good=0, ended=0, in_flight=300, elapsed_s=60) == "breaks"
    assert Trial(5.0).verdict(good=0, ended=0, in_flight=30, elapsed_s=6) == "open"


@pytest.mark.parametrize("capacity", [0.3, 1.0, 7.7, 100.0])
def test_the_search_brackets_the_capacity(capacity: float) -> None:
    search = Search()
    while (rate := search.next_rate()) is not None:
        search.trials.append(TrialResult(rate, rate <= capacity, 95, 100))
    low, high = search.keeps_up_to, search.breaks_from
    assert high is not None
    assert low <= capacity < high
    assert high / low <= 1.1001
    assert sum(trial.rate == low for trial in search.trials) == 2


def test_the_search_ends_without_an_answer() -> None:
    never, always = Search(), Search(max_trials=5)
    while (rate := never.next_rate()) is not None:
        never.trials.append(TrialResult(rate, False, 0, 40))
    assert never.keeps_up_to == 0.0
    while (rate := always.next_rate()) is not None:
        always.trials.append(TrialResult(rate, True, 40, 40))
    assert (always.keeps_up_to, always.breaks_from) == (16.0, None)


def test_a_wrong_trial_is_outvoted() -> None:
    """At 4 the first trial was lucky: tried again at the end, it breaks, and the search goes on below."""
    search = Search(tolerance=0.5)
    unlucky = [4.0]
    while (rate := search.next_rate()) is not None:
        keeps = rate < 4 or (rate in unlucky and not unlucky.remove(rate))  # type: ignore[func-returns-value]
        search.trials.append(TrialResult(rate, keeps, 1, 1))
    assert search.keeps_up_to < 4 <= (search.breaks_from or 0)
