import json
from datetime import UTC, datetime

import pytest
from harness.clouds import Answer, Asked, Aws, DropError, forever, serving
from hypothesis import given, settings
from hypothesis import strategies as st

from kervan.notices import aws
from kervan.notices.aws import AwsSource
from kervan.notices.metadata import MAX_BODY_BYTES, Metadata, SourceError

END = "2017-09-18T08:22:00Z"
END_S = datetime(2017, 9, 18, 8, 22, tzinfo=UTC).timestamp()
TOKEN_ASKED = "/latest/api/token"


class Clock:
    def __init__(self, now_s: float = END_S - 110) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


def source(metadata: Metadata, url: str, *, timeout_s: float = 10.0, clock: Clock | None = None) -> AwsSource:
    clock = clock or Clock()
    return AwsSource(metadata, url=url, node="n1", timeout_s=timeout_s, wall=clock, monotonic=clock)


async def test_there_is_nothing_before_the_notice_and_then_there_is() -> None:
    cloud = Aws()
    async with serving(cloud) as server, Metadata() as metadata:
        watched = source(metadata, server.url)
        assert await watched.poll() == []  # 404 twice
        cloud.items["spot/instance-action"] = json.dumps({"action": "terminate", "time": END})
        (notice,) = await watched.poll()
    assert (notice.kind, notice.source, notice.node, notice.is_certain) == ("preemption", "aws", "n1", True)
    assert notice.deadline_s == END_S
    assert notice.remaining_s(END_S - 110) == 110
    assert json.loads(notice.detail)["action"] == "terminate"
    assert len(cloud.tokens) == 1  # one token for four questions


@pytest.mark.parametrize("key", ["action", "instance-action"])
@pytest.mark.parametrize("action", ["terminate", "stop"])
def test_both_spellings(key: str, action: str) -> None:
    notice = aws.parse_action(json.dumps({key: action, "time": END}), node="n1", now_s=END_S - 120)
    assert notice is not None
    assert notice.deadline_s == END_S


@pytest.mark.parametrize(
    ("action", "time", "now_s", "deadline_s"),
    [
        pytest.param("terminate", END, END_S - 100, END_S, id="UTC"),
        pytest.param("terminate", "2017-09-18T10:22:00+02:00", END_S - 100, END_S, id="another offset"),
        pytest.param("terminate", "2017-09-18T08:22:00.250Z", END_S - 100, END_S + 0.25, id="with a fraction"),
        pytest.param("hibernate", END, END_S - 100, END_S - 100, id="hibernation begins at once"),
        pytest.param("terminate", END, END_S - 500, END_S - 380, id="a late clock: no notice is longer than 120 s"),
        pytest.param("terminate", END, END_S + 30, END_S, id="past, by a little: it is overdue"),
        pytest.param("terminate", END, END_S + 7200, None, id="past for hours: it did not happen"),
    ],
)
def test_deadlines(action: str, time: str, now_s: float, deadline_s: float | None) -> None:
    notice = aws.parse_action(json.dumps({"action": action, "time": time}), node="n1", now_s=now_s)
    assert (None if notice is None else notice.deadline_s) == deadline_s


async def test_a_rebalance_recommendation_is_not_certain_and_has_no_deadline() -> None:
    cloud = Aws()
    cloud.items["events/recommendations/rebalance"] = '{"noticeTime": "2020-10-27T08:22:00Z"}'
    async with serving(cloud) as server, Metadata() as metadata:
        (notice,) = await source(metadata, server.url).poll()
    assert (notice.kind, notice.is_certain, notice.deadline_s) == ("rebalance", False, None)


@pytest.mark.parametrize("broken", ["spot/instance-action", "events/recommendations/rebalance"])
async def test_what_is_wrong_with_one_item_does_not_hide_the_other(broken: str) -> None:
    cloud = Aws()
    cloud.items["spot/instance-action"] = json.dumps({"action": "stop", "time": END})
    cloud.items["events/recommendations/rebalance"] = json.dumps({"noticeTime": END})
    cloud.items[broken] = "{"
    async with serving(cloud) as server, Metadata() as metadata:
        (notice,) = await source(metadata, server.url).poll()
    assert notice.kind == ("rebalance" if broken == "spot/instance-action" else "preemption")


async def test_a_token_is_renewed_before_it_expires() -> None:
    cloud, clock = Aws(ttl_s="100"), Clock(0)
    async with serving(cloud) as server, Metadata() as metadata:
        watched = source(metadata, server.url, clock=clock)
        await watched.poll()
        clock.now_s = 89
        await watched.poll()
        assert len(cloud.tokens) == 1
        clock.now_s = 90  # 0.9 of 100 s
        await watched.poll()
        assert len(cloud.tokens) == 2


async def test_a_token_that_the_server_forgot_is_renewed_on_401() -> None:
    cloud = Aws()
    async with serving(cloud) as server, Metadata() as metadata:
        watched = source(metadata, server.url)
        await watched.poll()
        cloud.is_valid = False
        cloud.items["spot/instance-action"] = json.dumps({"action": "terminate", "time": END})
        assert len(await watched.poll()) == 1
        assert len(cloud.tokens) == 2


async def test_a_server_that_takes_no_token_is_no_endless_loop() -> None:
    class Refuses(Aws):
        async def answer(self, asked: Asked) -> Answer:
            return await super().answer(asked) if asked.path == TOKEN_ASKED else Answer(401)

    async with serving(Refuses()) as server, Metadata() as metadata:
        with pytest.raises(SourceError, match="HTTP 401"):
            await source(metadata, server.url).poll()
        assert len(server.asked) <= 8


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (403, "", "PUT /latest/api/token: HTTP 403"),
        (200, "", "PUT /latest/api/token: HTTP 200"),
        (200, "a\nb", "PUT"),
        (200, "\u00e9", "PUT"),
    ],
)
async def test_what_is_no_token_is_not_sent_back(status: int, body: str, says: str) -> None:
    class Odd(Aws):
        async def answer(self, asked: Asked) -> Answer:
            return Answer(status, body)

    async with serving(Odd()) as server, Metadata() as metadata:
        with pytest.raises(SourceError, match=says):
            await source(metadata, server.url).poll()
        assert {asked.method for asked in server.asked} == {"PUT"}


async def test_a_token_that_does_not_come_names_the_hop_limit() -> None:
    class Silent(Aws):
        async def answer(self, asked: Asked) -> Answer:
            await forever()
            raise AssertionError("not reached")

    async with serving(Silent()) as server, Metadata() as metadata:
        with pytest.raises(SourceError, match="http-put-response-hop-limit 2"):
            await source(metadata, server.url, timeout_s=0.05).poll()


@pytest.mark.parametrize("status", [500, 503, 301, 403])
async def test_other_answers_are_no_notice(status: int) -> None:
    cloud = Aws()
    cloud.status = status
    async with serving(cloud) as server, Metadata() as metadata:
        with pytest.raises(SourceError, match=f"HTTP {status}"):
            await source(metadata, server.url).poll()


async def test_a_redirect_is_not_followed() -> None:
    class Redirects(Aws):
        async def answer(self, asked: Asked) -> Answer:
            if asked.path == "/elsewhere":
                return Answer(200, json.dumps({"action": "terminate", "time": END}))
            if asked.path == TOKEN_ASKED:
                return await super().answer(asked)
            return Answer(302, "", {"Location": "/elsewhere"})

    async with serving(Redirects()) as server, Metadata() as metadata:
        with pytest.raises(SourceError, match="HTTP 302"):
            await source(metadata, server.url).poll()


async def test_a_refused_a_dropped_and_an_endless_answer_are_errors_of_the_source() -> None:
    class Ends(Aws):
        async def answer(self, asked: Asked) -> Answer:
            raise DropError

    class Endless(Aws):
        async def answer(self, asked: Asked) -> Answer:
            return Answer(200, "x" * (MAX_BODY_BYTES + 1))

    async with Metadata() as metadata:
        async with serving(Ends()) as server:
            with pytest.raises(SourceError, match="ServerDisconnectedError"):
                await source(metadata, server.url).poll()
        with pytest.raises(SourceError, match="PUT"):  # refused: the server is gone
            await source(metadata, server.url).poll()
        async with serving(Endless()) as server:
            with pytest.raises(SourceError, match="longer than"):
                await source(metadata, server.url).poll()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        '{"action": "none", "time": "2017-09-18T08:22:00Z"}',
        '{"action": "terminate"}',
        '{"action": "terminate", "time": 1505722920}',
        '{"action": "terminate", "time": "2017-09-18"}',
        '{"action": "terminate", "time": "2017-09-18T08:22:00"}',  # no offset: whose time would that be?
        '{"action": "terminate", "time": "2017-13-18T08:22:00Z"}',
        '{"action": "terminate", "time": "0000-00-00T00:00:00Z"}',
        '{"action": ["terminate"], "time": "2017-09-18T08:22:00Z"}',
        "[" * 100_000,
    ],
)
def test_what_is_no_notice(text: str) -> None:
    with pytest.raises(SourceError):
        aws.parse_action(text, node="n1", now_s=END_S)
    with pytest.raises(SourceError):
        aws.parse_rebalance(text, node="n1", now_s=END_S)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=20) | st.sampled_from(["terminate", END]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["action", "instance-action", "time", "noticeTime", "x"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@settings(deadline=None)
@given(st.binary().map(lambda raw: raw.decode("utf-8", errors="replace")) | st.text() | JSON.map(json.dumps))
def test_any_text_gives_a_notice_only_if_it_is_one(text: str) -> None:
    try:
        notice = aws.parse_action(text, node="n1", now_s=END_S)
    except SourceError:
        return
    document = json.loads(text)
    assert document.get("action", document.get("instance-action")) in aws.ACTIONS
    assert document["time"] == END
    assert notice is not None
    assert notice.deadline_s == END_S
