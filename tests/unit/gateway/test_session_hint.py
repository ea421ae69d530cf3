import json

import pytest

from kervan.gateway import session_hint

CHAT = {"messages": [{"role": "user", "content": 'a "user": b'}]}


@pytest.mark.parametrize(
    ("header", "body", "expected"),
    [
        (None, CHAT, ""),
        (None, CHAT | {"user": "u"}, "u"),
        (None, CHAT | {"user": "u", "prompt_cache_key": "k"}, "k"),
        (None, CHAT | {"user": "u", "prompt_cache_key": "k", "session_id": "s"}, "s"),
        ("h", CHAT | {"user": "u"}, "h"),
        ("h", CHAT, "h"),
        (None, CHAT | {"user": 7}, ""),
        (None, CHAT | {"user": ""}, ""),
        (None, CHAT | {"user": None, "prompt_cache_key": ""}, ""),
    ],
)
def test_the_most_exact_name_of_a_session_is_taken(header: str | None, body: dict[str, object], expected: str) -> None:
    headers = [(b"accept", b"*/*")] + ([(b"x-session-id", header.encode())] if header else [])
    assert session_hint.read({"headers": headers}, json.dumps(body).encode()) == expected


@pytest.mark.parametrize("body", [b"", b"[]", b'{"user": "u"', b'{"user": "\xff"}', b'"user": 1', b"[" * 9999])
def test_what_is_no_json_object_has_no_session(body: bytes) -> None:
    assert session_hint.read({"headers": []}, body) == ""


def test_a_long_name_is_kept_short_and_still_its_own() -> None:
    names = [
        session_hint.read({"headers": [(b"x-session-id", b"x" * 5000 + tail)]}, b"") for tail in (b"a", b"b", b"a")
    ]
    assert names[0] == names[2] != names[1]
    assert len(names[0]) <= session_hint.MAX_CHARS
