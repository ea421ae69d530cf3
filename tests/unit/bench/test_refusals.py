"""What a client makes of refusals."""

import pytest

from kervan.bench.refusals import MAX_PAUSE_S, is_hopeless, is_refusal, pause_s, retry_after_s


@pytest.mark.parametrize(
    ("kind", "hopeless", "refusal"),
    [
        ("http_400", True, True), ("http_401", True, True), ("http_404", True, True), ("http_307", True, True),
        ("refused", True, True), ("no_stream", True, False), ("garbage", True, False),
        ("http_429", False, True), ("http_503", False, True), ("http_500", False, True), ("http_408", False, True),
        ("timeout", False, False), ("truncated", False, False), ("not_sent", False, False), ("closed", False, False),
    ],
)  # fmt: skip
def test_kinds(kind: str, hopeless: bool, refusal: bool) -> None:
    assert (is_hopeless(kind), is_refusal(kind)) == (hopeless, refusal)


@pytest.mark.parametrize(
    ("header", "wait_s"),
    [
        ("2", 2.0), (" 0 ", 0.0), ("Thu, 01 Jan 1970 00:02:00 GMT", 20.0), ("Thu, 01 Jan 1970 00:00:01 GMT", 0.0),
        ("soon", None), ("-5", None), ("", None), ("1.5", 1.5), ("\u00b2", None),
    ],
)  # fmt: skip
def test_retry_after(header: str, wait_s: float | None) -> None:
    assert retry_after_s({"retry-after": header}, 100.0) == wait_s


def test_pauses_double_up_to_a_bound_and_keep_to_what_the_server_asks() -> None:
    pauses = [pause_s(n, None) for n in range(1, 6)]
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, MAX_PAUSE_S])
    assert pause_s(10**6, None) == MAX_PAUSE_S
    assert (pause_s(1, 7.0), pause_s(3, 0.0)) == (7.0, 0.4)
