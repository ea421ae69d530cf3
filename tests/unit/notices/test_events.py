import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kervan.errors import ConfigError
from kervan.notices.events import MAX_DETAIL_CHARS, Notice, cut, soonest
from kervan.notices.settings import NoticeSettings, from_environment

NOTICES = st.builds(
    Notice,
    kind=st.sampled_from(["preemption", "rebalance", "maintenance", "pause", "sigterm", "operator"]),
    source=st.sampled_from(["aws", "gcp", "azure", "signal", "operator"]),
    node=st.text(max_size=5),
    event_id=st.text(max_size=5),
    deadline_s=st.none() | st.floats(0, 4e9),
    seen_s=st.floats(0, 4e9),
    is_certain=st.booleans(),
    detail=st.text(max_size=20),
)


def notice(**fields: object) -> Notice:
    values: dict[str, object] = {
        "kind": "preemption",
        "source": "aws",
        "node": "n1",
        "event_id": "e1",
        "deadline_s": 120.0,
        "seen_s": 0.0,
        "is_certain": True,
    }
    return Notice(**{**values, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("deadline_s", "now_s", "remaining_s"), [(120.0, 20.0, 100.0), (120.0, 130.0, 0.0), (None, 5.0, None)]
)
def test_remaining_time(deadline_s: float | None, now_s: float, remaining_s: float | None) -> None:
    assert notice(deadline_s=deadline_s).remaining_s(now_s) == remaining_s


@pytest.mark.parametrize(
    ("deadline_s", "than_s", "is_sooner"),
    [
        (100.0, 120.0, True),
        (120.0, 100.0, False),
        (119.7, 120.0, False),  # 0.3 s are rounding
        (100.0, None, True),
        (None, 100.0, False),
        (None, None, False),
    ],
)
def test_only_a_nearer_deadline_is_news(deadline_s: float | None, than_s: float | None, is_sooner: bool) -> None:
    assert notice(deadline_s=deadline_s).is_sooner_than(notice(deadline_s=than_s)) is is_sooner


def test_a_notice_of_the_same_thing_has_the_same_identity_whatever_its_deadline() -> None:
    assert notice().identity == notice(deadline_s=1.0, seen_s=2.0, detail="x").identity
    others = [notice(kind="rebalance"), notice(source="gcp"), notice(node="n2"), notice(event_id="e2")]
    assert len({notice().identity, *(other.identity for other in others)}) == 5


def test_the_soonest_is_certain_and_has_the_nearest_deadline() -> None:
    drain = notice(kind="operator", deadline_s=None)
    late, early = notice(deadline_s=90.0), notice(deadline_s=30.0)
    pause = notice(kind="pause", is_certain=False, deadline_s=5.0)
    assert soonest([drain, late, pause, early]) is early
    assert soonest([pause, drain]) is drain
    assert soonest([pause]) is None


@settings(deadline=None)
@given(NOTICES)
def test_json_there_and_back(one: Notice) -> None:
    assert Notice.from_json(one.to_json()) == one
    assert json.loads(one.to_json())["node"] == one.node


@settings(deadline=None)
@given(st.binary())
def test_other_bytes_are_no_notice(raw: bytes) -> None:
    with pytest.raises(ValueError):
        Notice.from_json(raw)


def test_long_details_are_cut() -> None:
    assert cut("x" * MAX_DETAIL_CHARS) == "x" * MAX_DETAIL_CHARS
    assert len(cut("x" * 10_000)) == MAX_DETAIL_CHARS


# ---- settings


def test_whatever_cloud_there_is_is_watched_unless_it_is_turned_off() -> None:
    assert from_environment({"PATH": "/bin"}) == NoticeSettings()
    assert NoticeSettings().watch == ("auto",)
    assert from_environment({"KERVAN_NOTICES_WATCH": ""}).watch == ()


def test_settings_come_from_the_environment() -> None:
    settings = from_environment(
        {
            "KERVAN_NOTICES_WATCH": "auto, signal",
            "KERVAN_NOTICES_AWS_URL": "http://127.0.0.1:1338/",
            "KERVAN_NOTICES_GCP_LEAD_S": "120",
        }
    )
    assert settings.watch == ("auto", "signal")
    assert settings.aws_url == "http://127.0.0.1:1338"
    assert settings.gcp_lead_s == 120.0


@pytest.mark.parametrize(
    ("variable", "value", "remedy"),
    [
        ("KERVAN_NOTICES_WATCH", "asw", "is not one of auto, aws, gcp, azure, signal"),
        ("KERVAN_NOTICES_PERIOD", "1", "known ones: KERVAN_NOTICES_WATCH"),
        ("KERVAN_NOTICES_AWS_PERIOD_S", "5s", "write for example 2.5"),
        ("KERVAN_NOTICES_AWS_PERIOD_S", "-1", "leave it out for the default"),
        ("KERVAN_NOTICES_AWS_PERIOD_S", "nan", "leave it out for the default"),
        ("KERVAN_NOTICES_AZURE_URL", "127.0.0.1:80", "write for example http://127.0.0.1:1338"),
    ],
)
def test_wrong_settings_say_what_is_right(variable: str, value: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=remedy):
        from_environment({variable: value})
