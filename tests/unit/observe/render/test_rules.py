import pytest

from kervan.observe.render import rules


def test_each_alert_says_what_it_means_why_its_threshold_and_what_to_do() -> None:
    for alert in rules.alerts():
        for text in (alert.summary, alert.meaning, alert.threshold, alert.action):
            assert len(text) > 15, alert.name
            assert text.isascii()
        assert "$labels." in alert.summary
    names = [alert.name for alert in rules.alerts()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("objective", "fast"), [(0.99, 0.144), (0.999, 0.0144), (0.9, 1.44)])
def test_burn_rates_follow_the_objective(objective: float, fast: float) -> None:
    (alert,) = [one for one in rules.alerts(objective) if one.name == "KervanSloBurnsFast"]
    assert f"ratio_rate1h > {fast:g} and" in alert.expr


def test_what_burn_rates_compare_is_recorded() -> None:
    recorded = {one.record for one in rules.RECORDINGS}
    for alert in rules.alerts():
        for word in alert.expr.replace("(", " ").replace("[", " ").split():
            assert not word.startswith("fleet:") or word in recorded
