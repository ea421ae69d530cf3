"""Proofs that a gateway knows its fleet's secret. The secret itself never travels.

| a gateway proves it | with | which holds | inside of |
|---|---|---|---|
| to a replica, in HELLO | `link_proof` | for one session, and a replica takes each session once | `curve` |
| to a gateway that takes copies | `copies_proof` | for one connection, whose nonce the taker draws | `pinned_tls` |
| to a gateway that is passed a request | `relay_key` | as long as the secret | `pinned_tls` |

`kervan profile` shows gateways the same key, from their nodes: who has it can let them record themselves.

Nothing here encrypts: without what it is inside of (a plain fleet), who overhears a `relay_key` can use it.
"""

import hashlib
import hmac
import time

import msgspec

NONCE_BYTES = 16
GRACE_S = 900.0


class Secrets:
    """What a process takes for its fleet's secret: the present one, and for `GRACE_S` the one before a change of keys.

    What it proves itself with is always the present one.
    """

    def __init__(self, secret: str, before: str = "") -> None:
        self.present = secret
        self._before = before
        self._ends_s = time.monotonic() + GRACE_S

    @property
    def taken(self) -> tuple[str, ...]:
        """Those that are as good as the present one, which comes first."""
        is_kept = self._before and time.monotonic() < self._ends_s
        return (self.present, self._before) if is_kept else (self.present,)


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
