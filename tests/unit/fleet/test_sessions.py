"""A replica's end of the handshake."""

import msgspec
import pytest

from kervan.fleet import auth, curve, wire
from kervan.fleet.sessions import Session, Sessions
from kervan.fleet.step_clock import StepClock

SECRET = "s3cret"
FACTS = wire.EngineFacts(max_model_len=4096, num_gpu_blocks=100, block_size=16, max_num_seqs=64)


def sessions(replica_id: str = "r1", before: str = "") -> Sessions:
    return Sessions(
        replica_id=replica_id,
        secrets=auth.Secrets(SECRET, before),
        engine_version="0.32.0",
        begin=lambda index: ("tcp://h:2", FACTS),
        end=lambda index: 0,
    )


def hello(identity: bytes, gateway_id: str = "g1") -> bytes:
    """What gateway `gateway_id` says to replica r1."""
    proof = auth.link_proof(SECRET, session=identity, gateway_id=gateway_id, replica_id="r1")
    return msgspec.msgpack.encode(wire.Hello(wire.PROTOCOL, "0.32.0", gateway_id, proof))


def test_a_gateway_of_before_a_change_of_keys_is_welcome_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr(auth.time, "monotonic", lambda: now_s)
    ours = sessions(before="older")
    proof = auth.link_proof("older", session=b"one", gateway_id="g1", replica_id="r1")
    said = msgspec.msgpack.encode(wire.Hello(wire.PROTOCOL, "0.32.0", "g1", proof))
    assert ours.allowed_keys() == [curve.of_gateways("s3cret").public, curve.of_gateways("older").public]
    assert ours.greet(b"one", said)[0] == wire.WELCOME
    now_s += auth.GRACE_S
    assert ours.allowed_keys() == [curve.of_gateways("s3cret").public]
    assert sessions_refuses(ours, "older")
    assert ours.greet(b"two", hello(b"two", "g2"))[0] == wire.WELCOME


def sessions_refuses(ours: Sessions, secret: str) -> bool:
    proof = auth.link_proof(secret, session=b"late", gateway_id="g3", replica_id="r1")
    said = msgspec.msgpack.encode(wire.Hello(wire.PROTOCOL, "0.32.0", "g3", proof))
    return ours.greet(b"late", said) == (
        wire.REFUSED, b"the gateway does not know this fleet's secret; it belongs to another fleet"
    )  # fmt: skip


def test_a_gateway_that_comes_again_has_a_session_of_its_own() -> None:
    ours = sessions()
    assert ours.greet(b"one", hello(b"one"))[0] == wire.WELCOME
    assert ours.greet(b"two", hello(b"two"))[0] == wire.WELCOME
    assert [session.identity for session in ours.live] == [b"two"]
    assert ours.greet(b"three", hello(b"three", "g2"))[0] == wire.WELCOME
    assert [session.identity for session in ours.live] == [b"two", b"three"]


@pytest.mark.parametrize(
    ("replica_id", "identity", "words"),
    [
        pytest.param("r1", b"thief", b"does not know this fleet's secret", id="from another session"),
        pytest.param("r2", b"one", b"does not know this fleet's secret", id="to another replica"),
        pytest.param("r1", b"one", b"has been here before", id="of a session that is over"),
    ],
)
def test_what_was_overheard_opens_no_session(replica_id: str, identity: bytes, words: bytes) -> None:
    overheard = hello(b"one")
    ours = sessions(replica_id)
    if replica_id == "r1":
        assert ours.greet(b"one", overheard)[0] == wire.WELCOME
        ours.greet(b"two", hello(b"two"))  # the gateway came again: the first session is over
    before = [session.identity for session in ours.live]
    kind, reason = ours.greet(identity, overheard)
    assert (kind, words in reason) == (wire.REFUSED, True)
    assert [session.identity for session in ours.live] == before
    assert ours.seen(identity) is None


def test_one_whose_lease_has_ended_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = sessions()
    ours.greet(b"one", hello(b"one"))
    monkeypatch.setattr(wire, "LEASE_S", -1.0)
    ours.end_expired()
    assert ours.seen(b"one") is None
    identity, kind, why = ours.refuse(b"one")
    assert (identity, kind) == (b"one", wire.REFUSED)
    assert b"no heartbeat for" in why
    assert b"no HELLO" in ours.refuse(b"two")[2]


def test_what_a_gateway_tells_of_prefixes_goes_to_the_others_once() -> None:
    ours = sessions()
    for identity in (b"one", b"two", b"three"):
        ours.greet(identity, hello(identity, f"gateway {identity!r}"))
    one, two, three = ours.live

    def pong(session: Session) -> bytes:
        told = ours.pong(session, (0, 0, 0.0), is_draining=False, has_work=False, clock=StepClock())
        return msgspec.msgpack.decode(told, type=wire.Pong).prefixes

    ours.ping(0, msgspec.msgpack.encode(wire.Ping(0, prefixes=b"12345678")))
    ours.ping(1, msgspec.msgpack.encode(wire.Ping(0, prefixes=b"abcdefgh")))
    assert [pong(one), pong(two), pong(three)] == [b"abcdefgh", b"12345678", b"12345678abcdefgh"]
    assert [pong(one), pong(two), pong(three)] == [b"", b"", b""]
    for n in range(3):
        ours.ping(0, msgspec.msgpack.encode(wire.Ping(0, prefixes=bytes([n]) * (wire.MAX_NEWS_BYTES // 2))))
    assert pong(two) == bytes([1]) * (wire.MAX_NEWS_BYTES // 2) + bytes([2]) * (wire.MAX_NEWS_BYTES // 2)
