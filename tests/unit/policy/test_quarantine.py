import pytest

from kervan.policy import quarantine


@pytest.mark.parametrize(
    ("losses", "unproven", "gave_token", "was_alive", "action", "new_losses", "new_unproven"),
    [
        pytest.param(0, 0, True, True, "move", 0, 0, id="gave a token: cleared"),
        pytest.param(1, 3, True, True, "move", 0, 0, id="gave a token since: cleared"),
        pytest.param(0, 0, False, True, "try_alone", 1, 0, id="first loss without a token"),
        pytest.param(
            0, 0, False, False, "try_alone", 1, 0, id="first loss, replica perhaps dead before: only a suspect"
        ),
        pytest.param(1, 0, False, True, "reject", 2, 0, id="second loss, alone: rejected"),
        pytest.param(1, 0, False, False, "try_alone", 1, 1, id="second loss, replica perhaps dead before: tried again"),
        pytest.param(1, 3, False, False, "try_alone", 1, 4, id="fourth such loss"),
        pytest.param(1, 4, False, False, "reject", 1, 5, id="fifth such loss: enough"),
        pytest.param(0, 1, False, True, "try_alone", 1, 1, id="its last replica came back: a loss as if the first"),
        pytest.param(0, 5, False, True, "reject", 1, 5, id="five came back: enough"),
    ],
)
def test_decisions(
    losses: int, unproven: int, gave_token: bool, was_alive: bool, action: str, new_losses: int, new_unproven: int
) -> None:
    decision = quarantine.decide(losses=losses, unproven_losses=unproven, gave_token=gave_token, was_alive=was_alive)
    assert (decision.action, decision.losses, decision.unproven_losses) == (action, new_losses, new_unproven)
    assert decision.reason


def test_a_stream_that_two_replicas_stood_still_over_is_rejected() -> None:
    for stalls, action in ((0, "try_alone"), (1, "try_alone"), (2, "reject")):
        decision = quarantine.decide(losses=0, unproven_losses=1, gave_token=False, was_alive=True, stalls=stalls)
        assert decision.action == action
    assert decision.reason.startswith("2 replicas made no step for too long after they got it")
    assert quarantine.decide(losses=0, unproven_losses=1, gave_token=True, was_alive=True, stalls=2).action == "move"


@pytest.mark.parametrize(("was_alive", "expected"), [(True, 2), (False, 1 + quarantine.MAX_UNPROVEN_LOSSES)])
def test_a_fatal_stream_is_rejected_after(was_alive: bool, expected: int) -> None:
    losses = unproven = num_replicas = 0
    while True:
        decision = quarantine.decide(losses=losses, unproven_losses=unproven, gave_token=False, was_alive=was_alive)
        losses, unproven, num_replicas = decision.losses, decision.unproven_losses, num_replicas + 1
        if decision.action == "reject":
            break
    assert num_replicas == expected
    assert "replicas were lost" in decision.reason
