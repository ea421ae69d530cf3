"""How much one API key may take: token buckets for requests and tokens, and places for streams. Pure.

A bucket holds a minute's worth and fills evenly, so any 60 s have at most twice the limit, and long times the limit.
Tokens are reserved when a request comes (its prompt, about, and what it may write), and settled when it has ended:
what was reserved and not used goes back, what was used beyond is owed.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

MINUTE_S = 60.0
MAX_RETRY_S = 3600

Reason = Literal["requests", "tokens", "streams", "too_large"]


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one key; 0 is no limit."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    streams: int = 0

    def share(self, num_parts: int) -> "Limits":
        """One of so many even parts, at least 1 of what is limited."""

        def part(limit: int) -> int:
            return limit and max(1, limit // max(1, num_parts))

        return Limits(part(self.requests_per_minute), part(self.tokens_per_minute), part(self.streams))


@dataclass(slots=True)
class Bucket:
    """Holds up to `per_minute`, and fills by as much in a minute. `level` may be below 0: then it is owed."""

    per_minute: int
    level: float
    at_s: float

    def fill(self, now_s: float) -> None:
        """Let the time until `now_s` pass; one that lies back changes nothing."""
        if now_s > self.at_s:
            rate = self.per_minute / MINUTE_S
            self.level = min(float(self.per_minute), self.level + rate * (now_s - self.at_s))
            self.at_s = now_s

    def wait_s(self, amount: float) -> float:
        """Until it has `amount`; what is above all that it can hold waits until it is full. 0: now."""
        lacking = min(amount, float(self.per_minute)) - self.level
        # A hair is no reason to wait: levels are sums of floats.
        return 0.0 if lacking <= 1e-9 else lacking * MINUTE_S / self.per_minute

    @property
    def full_in_s(self) -> float:
        """Until it is full."""
        return max(0.0, self.per_minute - self.level) * MINUTE_S / self.per_minute

    def give(self, amount: float) -> None:
        """Put back, or with an amount below 0 take what was used beyond what was reserved."""
        self.level = min(float(self.per_minute), self.level + amount)

    def change(self, per_minute: int) -> None:
        """Another limit: what has been taken stays taken."""
        self.level = min(float(per_minute), self.level + per_minute - self.per_minute)
        self.per_minute = per_minute


@dataclass(frozen=True, slots=True)
class Levels:
    """What is left of a key's limits, and in how many seconds all is. Without a limit: 0."""

    requests: float = 0.0
    requests_reset_s: float = 0.0
    tokens: float = 0.0
    tokens_reset_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Grant:
    """Whether a request may be worked on; if not, which limit it is, and when to try again (None: never)."""

    levels: Levels
    reason: Reason | None = None
    retry_after_s: int | None = None

    @property
    def is_granted(self) -> bool:
        """Whether it may."""
        return self.reason is None


@dataclass(slots=True)
class _Held:
    """Streams that one gateway has of the key, by its message `number`."""

    streams: int = 0
    number: int = 0


@dataclass(slots=True)
class KeyMeter:
    """Counts one key for all gateways of a fleet. `now_s` of all calls is of one clock.

    A gateway says with each message how many streams it `held` before, and numbers its messages: one that arrives
    late, or never, leaves nothing wrong for longer than until the next.
    """

    limits: Limits
    requests: Bucket | None
    tokens: Bucket | None
    _held: dict[str, _Held] = field(default_factory=dict)

    @classmethod
    def new(cls, limits: Limits, now_s: float, seen: Levels | None = None, seen_age_s: float = 0.0) -> "KeyMeter":
        """A meter with full buckets, or, where another one counted before, with what was seen of it."""

        def bucket(per_minute: int, level: float) -> Bucket | None:
            if not per_minute:
                return None
            made = Bucket(per_minute, float(per_minute) if seen is None else min(level, per_minute), now_s - seen_age_s)
            made.fill(now_s)
            return made

        return cls(
            limits,
            bucket(limits.requests_per_minute, 0.0 if seen is None else seen.requests),
            bucket(limits.tokens_per_minute, 0.0 if seen is None else seen.tokens),
        )

    def change(self, limits: Limits, now_s: float) -> None:
        """Other limits from now on."""
        if limits == self.limits:
            return
        self.limits = limits
        self.requests = _changed(self.requests, limits.requests_per_minute, now_s)
        self.tokens = _changed(self.tokens, limits.tokens_per_minute, now_s)

    def keep_gateways(self, gateway_ids: set[str]) -> None:
        """Forget the streams of gateways that are gone."""
        for gateway_id in [known for known in self._held if known not in gateway_ids]:
            del self._held[gateway_id]

    @property
    def num_streams(self) -> int:
        """Streams that the key has at all gateways."""
        return sum(held.streams for held in self._held.values())

    def levels(self, now_s: float) -> Levels:
        """What is left."""
        for bucket in (self.requests, self.tokens):
            if bucket is not None:
                bucket.fill(now_s)
        requests, tokens = self.requests, self.tokens
        return Levels(
            requests.level if requests is not None else 0.0,
            requests.full_in_s if requests is not None else 0.0,
            tokens.level if tokens is not None else 0.0,
            tokens.full_in_s if tokens is not None else 0.0,
        )

    def ask(
        self, gateway_id: str, now_s: float, *, requests: int, tokens: int, streams: int, held: int, number: int
    ) -> Grant:
        """Take what a request needs, if all of it is there; else take nothing.

        `streams`: that it opens; `held`: that the gateway has, or has asked for, without these.
        """
        is_late = self._note(gateway_id, held, number)
        levels = self.levels(now_s)
        if self.limits.streams and streams > self.limits.streams:
            return Grant(levels, "too_large")
        waits: list[tuple[float, Reason]] = []
        if self.requests is not None and (wait_s := self.requests.wait_s(requests)):
            waits.append((wait_s, "requests"))
        if self.tokens is not None and (wait_s := self.tokens.wait_s(tokens)):
            waits.append((wait_s, "tokens"))
        if waits:
            wait_s, reason = max(waits)
            return Grant(levels, reason, min(MAX_RETRY_S, max(1, math.ceil(wait_s))))
        if self.limits.streams and self.num_streams + (0 if is_late else streams) > self.limits.streams:
            return Grant(levels, "streams", 1)  # nobody knows when one ends
        if self.requests is not None:
            self.requests.level -= requests
        if self.tokens is not None:
            self.tokens.level -= tokens
        if not is_late:
            self._held[gateway_id].streams += streams
        return Grant(self.levels(now_s))

    def settle(self, gateway_id: str, now_s: float, *, requests: int, tokens: int, held: int, number: int) -> Levels:
        """Put back `requests` and `tokens` (below 0: take them); the gateway holds `held` streams now."""
        self._note(gateway_id, held, number)
        self.levels(now_s)
        if self.requests is not None:
            self.requests.give(requests)
        if self.tokens is not None:
            self.tokens.give(tokens)
        return self.levels(now_s)

    def _note(self, gateway_id: str, held: int, number: int) -> bool:
        """Whether a later message of this gateway was here before, which knew of this one."""
        known = self._held.setdefault(gateway_id, _Held())
        if number <= known.number:
            return True
        known.streams, known.number = held, number
        return False


def _changed(bucket: Bucket | None, per_minute: int, now_s: float) -> Bucket | None:
    if not per_minute:
        return None
    if bucket is None:
        return Bucket(per_minute, float(per_minute), now_s)
    bucket.fill(now_s)
    bucket.change(per_minute)
    return bucket


def counting_gateway(key: str, gateway_ids: Sequence[str]) -> str:
    """Which of the gateways counts a key for all of them: all choose the same, and each has about as many keys.

    When one goes, only its keys get another (rendezvous hashing).
    """
    return max(gateway_ids, key=lambda gateway_id: hashlib.sha256(f"{gateway_id} {key}".encode()).digest())
