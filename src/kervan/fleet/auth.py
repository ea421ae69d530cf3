"""Proofs that a gateway knows its fleet's secret. The secret itself never travels.

| a gateway proves it | with | of use to one who overhears it |
|---|---|---|
| to a replica, in HELLO | `link_proof` | no: it holds for one session, and a replica takes each session once |
| to a gateway that takes copies | `copies_proof` | no: it holds for one connection, whose nonce the taker draws |
| to a gateway that is passed a request | `relay_key` | little: it needs an API key, or an id; adapters can be changed |

`kervan profile` shows gateways the same key, from their nodes: who has it can let them record themselves.

Nothing here encrypts or signs what follows: fleets need a network that they can trust.
"""

import hashlib
import hmac

import msgspec

NONCE_BYTES = 16


def link_proof(secret: str, *, session: bytes, gateway_id: str, replica_id: str) -> bytes:
    """What HELLO carries. `session`: the ZMQ identity, drawn by the gateway for this link alone."""
    return _mac(secret, "link", session, gateway_id, replica_id)


def copies_proof(secret: str, *, nonce: bytes, gateway_id: str) -> bytes:
    """The response of a gateway to the `nonce` of the one that takes copies of its journals."""
    return _mac(secret, "copies", nonce, gateway_id)


def relay_key(secret: str) -> bytes:
    """What marks a request that a gateway passes on, as a header's value."""
    return _mac(secret, "relay").hex().encode()


def is_proof(given: bytes, expected: bytes) -> bool:
    """Whether they are equal; compared in constant time, so that the time does not reveal where they differ."""
    return hmac.compare_digest(given, expected)


def _mac(secret: str, purpose: str, *parts: bytes | str) -> bytes:
    """HMAC-SHA256. msgpack tells the parts apart, so no two lists of them give the same text."""
    return hmac.digest(secret.encode(), msgspec.msgpack.encode(["kervan", purpose, *parts]), hashlib.sha256)
