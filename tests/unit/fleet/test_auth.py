"""What proves that a gateway knows its fleet's secret."""

import pytest

from kervan.fleet import auth

SECRET = "s3cret"


def link(secret: str = SECRET, session: bytes = b"s", gateway_id: str = "g", replica_id: str = "r") -> bytes:
    return auth.link_proof(secret, session=session, gateway_id=gateway_id, replica_id=replica_id)


def copies(secret: str = SECRET, nonce: bytes = b"s", gateway_id: str = "g") -> bytes:
    return auth.copies_proof(secret, nonce=nonce, gateway_id=gateway_id)


@pytest.mark.parametrize(
    "other",
    [
        link("another"),
        link(session=b"t"),
        link(gateway_id="h"),
        link(replica_id="q"),
        link(gateway_id="gr", replica_id=""),
        copies(),
        copies(nonce=b"t"),
        copies(gateway_id="h"),
        copies("another"),
        auth.relay_key(SECRET),
        auth.relay_key("another"),
    ],
)
def test_a_proof_holds_for_one_thing(other: bytes) -> None:
    assert auth.is_proof(link(), link())
    assert not auth.is_proof(other, link())


@pytest.mark.parametrize("proof", [link(), copies(), auth.relay_key(SECRET)])
def test_a_proof_does_not_show_the_secret(proof: bytes) -> None:
    assert len(proof) >= 32
    assert SECRET.encode() not in proof


def test_the_relay_key_can_be_the_value_of_a_header() -> None:
    assert auth.relay_key(SECRET).decode().isalnum()
