import pytest

from kervan.policy import quarantine


@pytest.mark.parametrize(
    ("strikes", "gave_token", "action", "new_strikes"),
    [
        pytest.param(0, True, "move", 0, id="gave a token: innocent"),
        pytest.param(1, True, "move", 0, id="gave a token since: acquitted"),
        pytest.param(0, False, "try_alone", 1, id="first death without a token"),
        pytest.param(1, False, "give_up", 2, id="second death, alone: convicted"),
    ],
)
def test_verdicts(strikes: int, gave_token: bool, action: str, new_strikes: int) -> None:
    verdict = quarantine.decide(strikes=strikes, gave_token=gave_token)
    assert (verdict.action, verdict.strikes) == (action, new_strikes)
    assert verdict.reason


def test_a_poison_stream_costs_two_replicas() -> None:
    strikes = deaths = 0
    while True:
        verdict = quarantine.decide(strikes=strikes, gave_token=False)
        strikes, deaths = verdict.strikes, deaths + 1
        if verdict.action == "give_up":
            break
    assert deaths == quarantine.MAX_STRIKES == 2
    assert "2 replicas were lost" in verdict.reason
