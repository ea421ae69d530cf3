import datetime
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kervan.config import autoscale, fleet
from kervan.config.autoscale import DAY_MINUTES, local_minute, parse_ray, parse_schedule, parse_time_zone
from kervan.config.fleet import FleetConfig, PoolBounds
from kervan.config.workload import Slo
from kervan.errors import ConfigError

# ---- minimums by the hour


@pytest.mark.parametrize(
    ("text", "days", "start", "end", "minimum"),
    [
        ("mon-fri 08:00 min=4", (0, 1, 2, 3, 4), 480, None, 4),
        ("sat,sun 10:00-22:00 min=2", (5, 6), 600, 1320, 2),
        ("daily 8:05 min=0", tuple(range(7)), 485, None, 0),
        ("22:00-06:00 min=3", tuple(range(7)), 1320, 360 + DAY_MINUTES, 3),  # over midnight
        ("fri-mon 00:00-24:00 min=1", (0, 4, 5, 6), 0, DAY_MINUTES, 1),
        ("* 23:59 min = 7", tuple(range(7)), 1439, None, 7),
        ("Mon-Wed,Sun 01:00 MIN=1", (0, 1, 2, 6), 60, None, 1),
    ],
)
def test_minimums_by_the_hour(text: str, days: tuple[int, ...], start: int, end: int | None, minimum: int) -> None:
    (one,) = parse_schedule([text])
    assert (one.days, one.start_minute, one.end_minute, one.minimum) == (days, start, end, minimum)
    assert one.text == text


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (["8am min=4"], "is not DAYS HH:MM min=N; write for example 'mon-fri 08:00 min=4'"),
        (["mon-fri 08:00"], "is not DAYS HH:MM min=N"),
        (["mon-fri 08:00 min=-1"], "is not DAYS HH:MM min=N"),
        (["mon-fri 08:00 min=4 max=5"], "is not DAYS HH:MM min=N"),
        (["0 8 * * 1-5"], "is not DAYS HH:MM min=N"),
        (["mom-fri 08:00 min=4"], "'mom' is no day; did you mean mon?"),
        (["xyz 08:00 min=4"], "'xyz' is no day; write mon, tue, wed, thu, fri, sat, sun or daily"),
        (["mon 25:00 min=4"], "25:00 is no time of the day; write 00:00 to 23:59"),
        (["mon 08:60 min=4"], "08:60 is no time of the day"),
        (["mon 24:00 min=4"], "begins at 24:00; write 00:00 of the next day"),
        (["mon 08:00-08:00 min=4"], "ends when it begins; write 08:00-09:00"),
        (["mon-fri 08:00 min=4", "wed 08:00 min=2"], "both begin on wed at 08:00; leave one of them out"),
    ],
)
def test_schedules_that_are_none_name_the_fix(entries: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        parse_schedule(entries)


@given(st.text(max_size=30))
def test_any_text_is_a_schedule_or_one_line_of_what_is_wrong(text: str) -> None:
    try:
        parse_schedule([text])
    except ConfigError as error:
        assert "\n" not in str(error).replace(repr(text), "")


def test_a_minute_is_that_of_the_time_zone() -> None:
    at = datetime.datetime(
        2026, 3, 29, 0, 30, tzinfo=datetime.UTC
    ).timestamp()  # a Sunday; Berlin: 1:30, before the jump
    assert local_minute(at, parse_time_zone("UTC")) == 6 * DAY_MINUTES + 30
    assert local_minute(at, parse_time_zone("Europe/Berlin")) == 6 * DAY_MINUTES + 90
    assert local_minute(at + 3600, parse_time_zone("Europe/Berlin")) == 6 * DAY_MINUTES + 210  # 3:30: 2:30 is not there


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Europe/Berln", "did you mean 'Europe/Berlin'?"),
        ("qq", "write for example UTC or Europe/Berlin"),
        ("", "is no time zone"),
        ("../etc/passwd", "is no time zone"),
    ],
)
def test_unknown_time_zones(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        parse_time_zone(name)


# ---- Ray Serve's parameters


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("target_num_ongoing_requests", ["target_ongoing_requests"]),
        ("target_num_ongoing_requests_per_replica", ["target_ongoing_requests"]),
        ("upscale_smoothing_factor", ["upscaling_factor"]),
        ("downscale_smoothing_factor", ["downscaling_factor"]),
        ("smoothing_factor", ["upscaling_factor", "downscaling_factor"]),
    ],
)
def test_old_names_are_taken_with_a_warning_that_names_the_new_one(old: str, new: list[str]) -> None:
    settings, (warning,) = parse_ray({old: 3})
    assert [getattr(settings, name) for name in new] == [3.0] * len(new)
    assert f"{old} is now {' and '.join(new)}" in warning


def test_a_factor_of_one_direction_wins_over_the_one_of_both() -> None:
    for names in (("smoothing_factor", "upscaling_factor"), ("upscaling_factor", "smoothing_factor")):
        settings, _ = parse_ray({name: {"smoothing_factor": 0.5, "upscaling_factor": 2}[name] for name in names})
        assert (settings.upscaling_factor, settings.downscaling_factor) == (2.0, 0.5)


@pytest.mark.parametrize(
    ("given_", "words"),
    [
        ({"target_ongoing_request": 5}, "unknown parameter 'target_ongoing_request'; did you mean 'target_ongoing_requests'?"),
        ({"zzz": 5}, "known: target_ongoing_requests, look_back_period_s"),
        ({"min_replicas": 1}, "write replicas: MIN..MAX"),
        ({"policy": "x"}, "write policy: slo, ray or fill"),
        ({"target_ongoing_requests": 0}, "target_ongoing_requests=0 is not above 0"),
        ({"target_ongoing_requests": "many"}, "'many' is not a number"),
        ({"target_ongoing_requests": True}, "True is not a number"),
        ({"target_ongoing_requests": float("nan")}, "nan is not above 0"),
        ({"upscale_delay_s": -1}, "upscale_delay_s=-1 is not at least 0"),
        ({"upscale_delay_s": "soon"}, "'soon' is not a duration"),
        ({"aggregation_function": "median"}, "is none of mean, max, min"),
        (
            {"target_ongoing_requests": 2, "target_num_ongoing_requests": 3},
            "gives target_ongoing_requests twice, as target_ongoing_requests and as target_num_ongoing_requests",
        ),
    ],
)  # fmt: skip
def test_wrong_parameters_name_the_fix(given_: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        parse_ray(given_)


def test_durations_may_have_units() -> None:
    settings, warnings = parse_ray({"downscale_delay_s": "5min", "downscale_to_zero_delay_s": None})
    assert (settings.downscale_delay_s, settings.downscale_to_zero_delay_s, warnings) == (300.0, None, ())


# ---- in a fleet's settings


def made(**settings: Any) -> FleetConfig:
    return fleet.from_mapping({"model": "m", **settings}, "f.yaml")


@pytest.mark.parametrize("settings", [{"replicas": 1, "max_replicas": 8}, {"replicas": "1..8"}])
def test_a_range_of_replicas_scales_by_the_slo(settings: dict[str, Any]) -> None:
    config = made(**settings)
    assert config.bounds == {"on-demand": PoolBounds(1, 8)}
    assert config.autoscaler is not None
    assert (config.autoscaler.policy, config.autoscaler.slo) == ("slo", Slo(ttft_s=2.0, tpot_s=0.05))


@pytest.mark.parametrize(
    "settings",
    [{}, {"replicas": 3}, {"replicas": 3, "max_replicas": 3}, {"pools": {"on-demand": "2", "spot": "4"}}],
)
def test_a_number_of_replicas_does_not_scale(settings: dict[str, Any]) -> None:
    assert made(**settings).autoscaler is None


@pytest.mark.parametrize(
    ("settings", "policy"),
    [
        ({}, "slo"),
        ({"autoscaling": {"target_ongoing_requests": 5}}, "ray"),
        ({"autoscaling": {"target_num_ongoing_requests": 5}}, "ray"),
        ({"autoscaling": {"downscale_delay_s": 60}}, "slo"),
        ({"autoscaling": {"target_ongoing_requests": 5}, "policy": "slo"}, "slo"),
        ({"policy": "ray"}, "ray"),
    ],
)
def test_rays_policy_is_used_when_its_target_is_given(settings: dict[str, Any], policy: str) -> None:
    found = made(replicas=1, max_replicas=8, **settings).autoscaler
    assert found is not None
    assert found.policy == policy


@pytest.mark.parametrize(
    ("settings", "warning"),
    [
        ({"policy": "slo", "autoscaling": {"target_ongoing_requests": 5}}, "target_ongoing_requests has no effect with policy slo"),
        ({"policy": "ray", "slo": "ttft=1s"}, "slo=ttft=1s decides nothing with policy ray"),
        ({"autoscaling": {"smoothing_factor": 2}}, "upscaling_factor has no effect with policy slo"),
    ],
)  # fmt: skip
def test_what_has_no_effect_is_told(settings: dict[str, Any], warning: str) -> None:
    found = made(replicas=1, max_replicas=8, **settings).autoscaler
    assert found is not None
    assert any(warning in text for text in found.warnings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"replicas": 5, "max_replicas": 3}, "max_replicas=3 is below replicas=5; write for example --replicas 3..5"),
        ({"pools": {"on-demand": "1..2"}, "max_replicas": 3}, "beside pools, which have a most of their own"),
        ({"policy": "best"}, "policy='best' is not one of slo, ray, fill"),
        ({"policy": "fill"}, "policy fill is about spot replicas"),
        ({"slo": "ttft=2"}, "slo ttft=2 has no unit"),
        ({"slo": "p99=2s"}, "is none of ttft=, tpot=, e2e="),
        ({"schedule": ["08:00 min=9"], "max_replicas": 8}, "wants 9 replicas, and the most is 8; write min=8"),
        ({"schedule": "08:00 min=2"}, "is str; give a list of texts"),
        ({"time_zone": "Mars"}, "is no time zone"),
        ({"autoscaling": {"target": 5}}, "has unknown parameter 'target'"),
        ({"autoscaling": 5}, "is int; give a mapping"),
    ],
)
def test_wrong_settings_of_scaling(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        made(**settings)


def test_files_and_stores_have_all_of_it(tmp_path: Any) -> None:
    path = tmp_path / "f.yaml"
    path.write_text(
        "model: m\nreplicas: 1..8\nslo: ttft=3s,tpot=100ms\nschedule: [mon-fri 08:00 min=4]\ntime-zone: Asia/Tokyo\n"
        "autoscaling: {downscale-delay-s: 2min}\n"
    )
    config = fleet.from_mapping(fleet.load_file(path), "f")
    assert (config.replicas, config.max_replicas) == (1, 8)
    found = config.autoscaler
    assert found is not None
    assert (found.ray.downscale_delay_s, found.given) == (120.0, {"downscale_delay_s"})
    assert (found.schedule[0].minimum, str(found.time_zone)) == (4, "Asia/Tokyo")
    assert FleetConfig.from_json(config.to_json()) == config


def test_ranges_in_files_that_are_none(tmp_path: Any) -> None:
    path = tmp_path / "f.yaml"
    path.write_text("replicas: 4..1\n")
    with pytest.raises(
        ConfigError, match=re.escape("replicas='4..1' is neither a number nor a range MIN..MAX; write 2 or 1..8")
    ):
        fleet.load_file(path)


def test_policies_have_their_names() -> None:
    assert autoscale.POLICIES == ("slo", "ray", "fill")
