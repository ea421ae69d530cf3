import pytest

from kervan.policy import quarantine


@pytest.mark.parametrize(
    ("strikes", "unseen", "gave_token", "was_alive", "action", "new_strikes", "new_unseen"),
    [
        pytest.param(0, 0, True, True, "move", 0, 0, id="gave a token: innocent"),
        pytest.param(1, 3, True, True, "move", 0, 0, id="gave a token since: acquitted"),
        pytest.param(0, 0, False, True, "try_alone", 1, 0, id="first loss without a token"),
        pytest.param(
            0, 0, False, False, "try_alone", 1, 0, id="first loss, replica perhaps dead before: only a suspect"
        ),
        pytest.param(1, 0, False, True, "give_up", 2, 0, id="second loss, alone: convicted"),
        pytest.param(1, 0, False, False, "try_alone", 1, 1, id="second loss, replica perhaps dead before: tried again"),
        pytest.param(1, 3, False, False, "try_alone", 1, 4, id="fourth such loss"),
        pytest.param(1, 4, False, False, "give_up", 1, 5, id="fifth such loss: enough"),
        pytest.param(0, 1, False, True, "try_alone", 1, 1, id="its last replica came back: a strike as if the first"),
        pytest.param(0, 5, False, True, "give_up", 1, 5, id="five came back: enough"),
    ],
)
def test_verdicts(
    strikes: int, unseen: int, gave_token: bool, was_alive: bool, action: str, new_strikes: int, new_unseen: int
) -> None:
    verdict = quarantine.decide(strikes=strikes, unseen_losses=unseen, gave_token=gave_token, was_alive=was_alive)
    assert (verdict.action, verdict.strikes, verdict.unseen_losses) == (action, new_strikes, new_unseen)
    assert verdict.reason


@pytest.mark.parametrize(("was_alive", "losses"), [(True, 2), (False, 1 + quarantine.MAX_UNSEEN_LOSSES)])
def test_a_poison_stream_is_given_up_after(was_alive: bool, losses: int) -> None:
    strikes = unseen = seen = 0
    while True:
        verdict = quarantine.decide(strikes=strikes, unseen_losses=unseen, gave_token=False, was_alive=was_alive)
        strikes, unseen, seen = verdict.strikes, verdict.unseen_losses, seen + 1
        if verdict.action == "give_up":
            break
    assert seen == losses
    assert "replicas were lost" in verdict.reason
