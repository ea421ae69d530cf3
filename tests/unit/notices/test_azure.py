import json
from datetime import UTC, datetime
from typing import Any

import pytest
from harness.clouds import Answer, Asked, Azure, forever, scheduled_event, serving
from hypothesis import given, settings
from hypothesis import strategies as st

from kervan.notices import azure
from kervan.notices.azure import AzureSource
from kervan.notices.metadata import Metadata, SourceError

NOT_BEFORE_S = datetime(2016, 9, 19, 18, 29, 47, tzinfo=UTC).timestamp()
NOW_S = NOT_BEFORE_S - 40


def source(
    metadata: Metadata, url: str, *, vm_name: str = "", timeout_s: float = 10.0, first_timeout_s: float = 10.0
) -> AzureSource:
    return AzureSource(
        metadata,
        url=url,
        node="n1",
        vm_name=vm_name,
        timeout_s=timeout_s,
        first_timeout_s=first_timeout_s,
        wall=lambda: NOW_S,
    )


async def test_a_preemption_of_this_vm() -> None:
    cloud = Azure()
    async with serving(cloud) as server, Metadata() as metadata:
        watched = source(metadata, server.url)
        assert await watched.poll() == []
        cloud.events = [scheduled_event()]
        (notice,) = await watched.poll()
    assert (notice.kind, notice.source, notice.event_id) == ("preemption", "azure", "602d9444")
    assert (notice.is_certain, notice.deadline_s) == (True, NOT_BEFORE_S)
    assert {asked.headers["metadata"] for asked in server.asked} == {"true"}
    assert server.asked[-1].query["api-version"] == "2020-07-01"


@pytest.mark.parametrize(
    ("resources", "is_ours"),
    [
        (["vm_0"], True),
        (["VM_0"], True),  # Azure's names ignore case
        (["vm_1", "vm_0"], True),
        (["vm_1"], False),
        (["vm_00"], False),
        ([], False),
        (None, False),
        ("vm_0", False),
        ([None, 7], False),
    ],
)
def test_only_events_that_name_this_vm_count(resources: Any, is_ours: bool) -> None:
    text = json.dumps({"DocumentIncarnation": 1, "Events": [scheduled_event(Resources=resources)]})
    notices, problems = azure.parse_events(text, vm_name="vm_0", node="n1", now_s=NOW_S)
    assert (len(notices), problems) == (int(is_ours), [])


@pytest.mark.parametrize(
    ("event_type", "kind", "is_certain"),
    [
        ("Preempt", "preemption", True),
        ("Terminate", "maintenance", True),
        ("Reboot", "maintenance", True),
        ("Redeploy", "maintenance", True),
        ("Freeze", "pause", False),
    ],
)
def test_kinds(event_type: str, kind: str, is_certain: bool) -> None:
    text = json.dumps({"Events": [scheduled_event(kind=event_type)]})
    ((notice,), _) = azure.parse_events(text, vm_name="vm_0", node="n1", now_s=NOW_S)
    assert (notice.kind, notice.is_certain) == (kind, is_certain)


@pytest.mark.parametrize(
    ("status", "not_before", "deadline_s"),
    [
        pytest.param("Scheduled", "Mon, 19 Sep 2016 18:29:47 GMT", NOT_BEFORE_S, id="scheduled"),
        pytest.param("Started", "", NOW_S, id="started: now"),
        pytest.param("Started", None, NOW_S, id="started without the field"),
        pytest.param("Scheduled", "", NOW_S + 30, id="scheduled without a time: the shortest notice"),
        pytest.param("Scheduled", "soon", NOW_S + 30, id="an unreadable time"),
        pytest.param("Scheduled", "Mon, 19 Sep 99999 18:29:47 GMT", NOW_S + 30, id="an impossible time"),
    ],
)
def test_deadlines(status: str, not_before: str | None, deadline_s: float) -> None:
    text = json.dumps({"Events": [scheduled_event(EventStatus=status, NotBefore=not_before)]})
    ((notice,), _) = azure.parse_events(text, vm_name="vm_0", node="n1", now_s=NOW_S)
    assert notice.deadline_s == deadline_s


async def test_an_event_that_starts_comes_nearer_and_stays_there() -> None:
    cloud, now_s = Azure(), NOW_S
    async with serving(cloud) as server, Metadata() as metadata:
        watched = AzureSource(metadata, url=server.url, node="n1", wall=lambda: now_s)
        cloud.events = [scheduled_event()]
        await watched.poll()
        now_s += 10  # 30 s before its time
        cloud.events = [scheduled_event(EventStatus="Started", NotBefore="")]
        (started,) = await watched.poll()
        assert started.deadline_s == now_s
        now_s += 5
        assert await watched.poll() == [started]
        cloud.events = []
        assert await watched.poll() == []


async def test_a_broken_event_does_not_hide_a_good_one() -> None:
    cloud = Azure()
    broken = [7, scheduled_event(EventId=""), scheduled_event(kind="Explode"), scheduled_event(EventStatus="Maybe")]
    cloud.events = [*broken, scheduled_event("good")]
    async with serving(cloud) as server, Metadata() as metadata:
        watched = source(metadata, server.url)
        (notice,) = await watched.poll()
        assert notice.event_id == "good"
        cloud.events = broken
        with pytest.raises(SourceError, match="an event is no object"):
            await watched.poll()


async def test_the_first_answer_may_be_slow_and_later_ones_may_not() -> None:
    cloud = Azure()
    cloud.first_answer_s = 0.2
    async with serving(cloud) as server, Metadata() as metadata:
        watched = source(metadata, server.url, vm_name="vm_0", timeout_s=0.1)
        assert await watched.poll() == []
        cloud.first_answer_s = 10.0
        with pytest.raises(SourceError, match=r"no answer in 0\.1 s"):
            await watched.poll()
        cloud.first_answer_s = 0.2  # it was switched off, and is switched on again by the question
        assert await watched.poll() == []


async def test_the_name_of_the_vm_is_asked_once_and_may_be_set() -> None:
    cloud = Azure(name="other")
    cloud.events = [scheduled_event()]
    async with serving(cloud) as server, Metadata() as metadata:
        watched = source(metadata, server.url)
        assert await watched.poll() == []
        await watched.poll()
        assert [asked.path for asked in server.asked].count("/metadata/instance/compute") == 1
        assert len(await source(metadata, server.url, vm_name="vm_0").poll()) == 1


@pytest.mark.parametrize("name", ["", None, 7])
async def test_without_a_name_no_event_is_believed(name: Any) -> None:
    cloud = Azure()
    cloud.compute["name"] = name
    cloud.events = [scheduled_event()]
    async with serving(cloud) as server, Metadata() as metadata:
        with pytest.raises(SourceError, match="KERVAN_NOTICES_AZURE_VM_NAME"):
            await source(metadata, server.url).poll()


async def test_an_acknowledgement_approves_the_event() -> None:
    cloud = Azure()
    cloud.events = [scheduled_event("mine")]
    async with serving(cloud) as server, Metadata() as metadata:
        watched = source(metadata, server.url)
        (notice,) = await watched.poll()
        assert await watched.acknowledge(notice)
    assert cloud.approved == ["mine"]


@pytest.mark.parametrize("resources", [["vm_0", "vm_1"], ["vm_0", *(f"vm_{n}" * 50 for n in range(1, 50))]])
async def test_an_event_of_other_vms_too_is_not_approved(resources: list[str]) -> None:
    cloud = Azure()
    cloud.events = [scheduled_event(Resources=resources)]
    async with serving(cloud) as server, Metadata() as metadata:
        watched = source(metadata, server.url)
        (notice,) = await watched.poll()
        assert not await watched.acknowledge(notice)
    assert cloud.approved == []


async def test_an_approval_that_is_not_taken_is_an_error() -> None:
    class Refuses(Azure):
        async def answer(self, asked: Asked) -> Answer:
            return Answer(400) if asked.method == "POST" else await super().answer(asked)

    cloud = Refuses()
    cloud.events = [scheduled_event()]
    async with serving(cloud) as server, Metadata() as metadata:
        watched = source(metadata, server.url)
        (notice,) = await watched.poll()
        with pytest.raises(SourceError, match="POST /metadata/scheduledevents: HTTP 400"):
            await watched.acknowledge(notice)


@pytest.mark.parametrize("raw", ["", "{", "null", "[]", '{"Events": 7}', '{"Events": null}', "[" * 100_000])
async def test_what_is_no_document(raw: str) -> None:
    cloud = Azure()
    cloud.raw = raw
    async with serving(cloud) as server, Metadata() as metadata:
        with pytest.raises(SourceError, match="/metadata/scheduledevents"):
            await source(metadata, server.url).poll()


async def test_a_server_that_hangs_is_left() -> None:
    class Hangs(Azure):
        async def answer(self, asked: Asked) -> Answer:
            await forever()
            raise AssertionError("not reached")

    async with serving(Hangs()) as server, Metadata() as metadata:
        with pytest.raises(SourceError, match="no answer"):
            await source(metadata, server.url, vm_name="vm_0", first_timeout_s=0.05).poll()


VALUES = (
    st.none()
    | st.integers()
    | st.text(max_size=10)
    | st.sampled_from(["Preempt", "Started", "Scheduled", "vm_0", "", "Mon, 19 Sep 2016 18:29:47 GMT"])
    | st.lists(st.sampled_from(["vm_0", "vm_1", None]), max_size=2)
)
EVENTS = st.dictionaries(
    st.sampled_from(["EventId", "EventType", "EventStatus", "Resources", "NotBefore", "x"]), VALUES, max_size=6
)
DOCUMENTS = st.fixed_dictionaries({"Events": st.lists(EVENTS | VALUES, max_size=4) | VALUES})


@settings(deadline=None)
@given(st.text() | DOCUMENTS.map(json.dumps) | st.binary().map(lambda raw: raw.decode("utf-8", errors="replace")))
def test_any_text_gives_a_notice_only_if_it_is_one(text: str) -> None:
    try:
        notices, _ = azure.parse_events(text, vm_name="vm_0", node="n1", now_s=NOW_S)
    except SourceError:
        return
    entries = [entry for entry in json.loads(text)["Events"] if isinstance(entry, dict)]
    for notice in notices:
        assert any(
            entry.get("EventId") == notice.event_id
            and "vm_0" in entry["Resources"]
            and entry["EventType"] in azure.KINDS
            and entry["EventStatus"] in ("Scheduled", "Started")
            for entry in entries
        )
