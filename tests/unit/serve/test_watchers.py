"""Whether a node gets a watcher."""

import asyncio

import pytest
from harness.clouds import Aws, serving

from kervan.notices.settings import NoticeSettings
from kervan.serve.watchers import has_something_to_watch

NOBODY = dict.fromkeys(("aws_url", "gcp_url", "azure_url"), "http://127.0.0.1:1")


@pytest.mark.parametrize(
    ("settings", "is_worth_it"),
    [
        (NoticeSettings(**NOBODY), False),  # type: ignore[arg-type]
        (NoticeSettings(watch=()), False),
        (NoticeSettings(watch=("auto", "signal"), **NOBODY), True),  # type: ignore[arg-type]
        (NoticeSettings(watch=("aws",), **NOBODY), True),  # type: ignore[arg-type]
        (NoticeSettings(state_file="/tmp/state.json", **NOBODY), True),  # type: ignore[arg-type]
    ],
    ids=["auto without a cloud", "turned off", "signal", "a cloud by name", "a state file"],
)
def test_a_watcher_is_started_where_there_is_something_to_watch(settings: NoticeSettings, is_worth_it: bool) -> None:
    assert asyncio.run(has_something_to_watch(settings)) is is_worth_it


async def test_a_cloud_that_answers_is_watched() -> None:
    async with serving(Aws()) as server:
        assert await has_something_to_watch(NoticeSettings(**{**NOBODY, "aws_url": server.url}))  # type: ignore[arg-type]


async def test_without_a_cloud_nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", logger="kervan"):
        assert not await has_something_to_watch(NoticeSettings(**NOBODY))  # type: ignore[arg-type]
    assert caplog.text == ""
