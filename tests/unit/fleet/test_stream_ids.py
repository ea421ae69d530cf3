"""The request's id in vLLM's ids of streams."""

import pytest

from kervan.fleet.stream_ids import ids, request_id

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.mark.parametrize(
    ("stream_id", "expected"),
    [
        ("cmpl-mine-0-0badcafe", "mine"),  # vLLM 0.32, a completion of one prompt
        ("cmpl-mine-3", "mine"),  # 0.24, the fourth prompt
        ("chatcmpl-mine-0badcafe", "mine"),
        ("1_chatcmpl-mine-0badcafe~2", "mine"),  # a second choice that has moved twice
        ("chatcmpl-order-17-0badcafe", "order-17"),
        ("chatcmpl-3f2504e04f8941d39a0c0305e82c3301", "3f2504e04f8941d39a0c0305e82c3301"),
        ("resp_abc", "abc"),
        ("kervan-canary", "kervan-canary"),
    ],
)
def test_the_clients_id_is_found_in_vllms(stream_id: str, expected: str) -> None:
    assert request_id(stream_id) == expected


@pytest.mark.parametrize(
    ("headers", "trace"),
    [({"traceparent": PARENT}, PARENT.split("-")[1]), ({}, ""), (None, ""), ({"traceparent": "no"}, "")],
)
def test_the_trace_is_that_of_the_request(headers: dict[str, str] | None, trace: str) -> None:
    found = ids("cmpl-a-0", headers)
    assert (found["stream"], found["request_id"], found["trace_id"]) == ("cmpl-a-0", "a", trace)
