"""What an API key lets a request do: which models, how many requests, tokens and streams.

A refusal comes before any work: 404 for a model as if there were none, 400 for what never fits, 429 with the time after
which it does. What is taken of a key's limits is held by a `Permit` while the request is worked on.
"""

import contextlib
import json
import re
from collections.abc import Awaitable, Iterator
from contextvars import Token
from dataclasses import dataclass
from typing import Any

import msgspec

from kervan.fleet.usage import Charge, KeyUsage, current_charge
from kervan.gateway import request_size
from kervan.gateway.asgi import CollectedResponse, Headers, Message, Send, error_body
from kervan.gateway.keys import Account, KeyRing, Rejection
from kervan.gateway.paths import makes_work
from kervan.gateway.quotas import Quotas
from kervan.gateway.request_size import RequestSize
from kervan.policy.quota import Grant, Levels, Limits

BYTES_PER_TOKEN = 4  # of a prompt as JSON, about; what it was in truth is settled at the end
MEDIUM_TOKENS = 1000  # an image or a piece of sound, about
UNSAID_OUTPUT_TOKENS = 256  # of a stream that does not say how much it may write
# Without work and without a model, and yet of the one who asked.
_OWN_SUFFIXES = ("/cancel", "/render", "/derender", "/count_tokens", "/tokenize", "/detokenize")
_DATA_URL = re.compile(rb"base64,[A-Za-z0-9+/=]{100,}")
_FORM_MODEL = re.compile(request_size.FORM_FIELD % b"model")


@dataclass(frozen=True, slots=True)
class KeyRefusal:
    """Why a key's request is not worked on, as HTTP."""

    status: int
    why: Rejection
    message: str
    param: str | None = None
    headers: Headers = ()


class _Asked(msgspec.Struct):
    """What is read of a body for a key that has limits or models."""

    model: Any = None
    max_tokens: Any = None
    max_completion_tokens: Any = None
    max_output_tokens: Any = None
    sampling_params: Any = None


class _ModelList(msgspec.Struct):
    data: list[dict[str, Any]] = []
    object: str = "list"


_asked_decoder = msgspec.json.Decoder(_Asked)
_models_decoder = msgspec.json.Decoder(_ModelList)


class Permit:
    """Holds what a request has of its key's limits; use it around the work. `charge` counts what its streams cost."""

    def __init__(self, guard: "KeyGuard", account: Account, *, tokens: int, streams: int, grant: Grant | None) -> None:
        self._guard = guard
        self._account = account
        self._reserved_tokens = tokens
        self._streams = streams
        self._grant = grant
        self._used_tokens = 0
        self._is_over = False
        self._is_shed = False
        self._charge = Charge(self._spent)
        self._token: Token[Charge | None] | None = None

    def named(self, send: Send) -> Send:
        """`send` that adds what is left of the limits to the head of the response."""
        if self._grant is None or not (headers := limit_headers(self._account.limits, self._grant.levels)):
            return send

        def with_limits(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *headers]}
            return send(message)

        return with_limits

    def shed(self) -> None:
        """The fleet has no room for the request: nothing of it counts, whose key is not to blame."""
        self._is_shed = True

    def _spent(self, model: str, usage: KeyUsage) -> None:
        self._account.spent(model, usage)
        used = usage.prompt_tokens + usage.generated_tokens
        self._used_tokens += used
        if self._is_over:  # its client left, and the stream ended after that
            self._guard.quotas.settle(self._account, requests=0, tokens=-used, streams=0)

    def __enter__(self) -> None:
        self._token = current_charge.set(self._charge)

    def __exit__(self, *_: object) -> None:
        assert self._token is not None
        current_charge.reset(self._token)
        self._is_over = True
        is_counted = self._grant is not None and not self._is_shed  # one that comes back was counted when it first came
        if is_counted:
            self._account.spent(self._charge.model or "", KeyUsage(requests=1))
        self._guard.quotas.settle(
            self._account,
            requests=1 if self._is_shed else 0,
            tokens=self._reserved_tokens - self._used_tokens,
            streams=self._streams,
        )


class KeyGuard:
    """Decides on requests of keys. `keys` says whose a request is; `quotas` keeps their limits."""

    def __init__(self, keys: KeyRing, quotas: Quotas) -> None:
        self.keys = keys
        self.quotas = quotas

    def check_model(self, account: Account, path: str, body: bytes, default_model: str | None) -> KeyRefusal | None:
        """Why a POST may not have its model; None if it may. `default_model`: where the body names none."""
        if account.entry is None or not account.entry.models:
            return None
        if not (makes_work(path) or path.endswith(_OWN_SUFFIXES)):
            message = f"key {account.name} is for some models, and may not use {path}, which acts on the whole fleet"
            return self._refuse(account, KeyRefusal(403, "model", message))
        named = [default_model if model is None else model for model in _models(body)]
        wrong = [name for name in named if name is not None and name not in account.entry.models]
        if not wrong:
            return None
        message = f"the model `{str(wrong[0])[:200]}` does not exist, or your key may not use it; see GET /v1/models"
        return self._refuse(account, KeyRefusal(404, "model", message, "model"))

    async def admit(self, account: Account, path: str, body: bytes, size: RequestSize) -> Permit | KeyRefusal:
        """Take what a request needs of its key's limits, to be held while it is worked on."""
        streams, limits = size.num_streams, account.limits
        if limits == Limits():
            account.num_streams += streams
            return Permit(self, account, tokens=0, streams=streams, grant=Grant(Levels()))
        tokens, output_tokens = 0, 0
        if limit := limits.tokens_per_minute:
            output_tokens = _max_output_tokens(path, body) * streams
            tokens = min(limit, output_tokens + _about_prompt_tokens(body))
        if 0 < limit < output_tokens or 0 < limits.streams < streams:
            return self._refuse(account, _never(account, limits, size, output_tokens))
        grant = await self.quotas.ask(account, tokens, streams)
        if grant.is_granted:
            return Permit(self, account, tokens=tokens, streams=streams, grant=grant)
        return self._refuse(account, _later(account, limits, grant))

    def resume(self, account: Account) -> Permit:
        """For a client that comes back to its stream: that has been let in, and goes on whatever the limits."""
        self.quotas.hold(account, 1)
        return Permit(self, account, tokens=0, streams=1, grant=None)

    @contextlib.contextmanager
    def charging(self, name: bytes) -> Iterator[None]:
        """Within, streams are charged to the key of this name, for which another gateway holds what they need."""
        account = self.keys.named(name.decode("latin-1"))
        if account is None:
            yield
            return

        def spent(model: str, usage: KeyUsage) -> None:
            account.spent(model, usage)
            used = usage.prompt_tokens + usage.generated_tokens
            self.quotas.settle(account, requests=0, tokens=-used, streams=0)

        token = current_charge.set(Charge(spent))
        try:
            yield
        finally:
            current_charge.reset(token)

    def _refuse(self, account: Account, refusal: KeyRefusal) -> KeyRefusal:
        self.keys.refuse(account, refusal.why)
        return refusal


def models_of(response: CollectedResponse, models: tuple[str, ...]) -> bytes | None:
    """The response to GET /v1/models with those of a key alone; None for what is no list of models."""
    if response.status != 200:
        return None
    try:
        listed = _models_decoder.decode(response.body)
    except msgspec.DecodeError:
        return None
    return msgspec.json.encode(_ModelList([card for card in listed.data if card.get("id") in models], listed.object))


def unknown_model(path: str) -> bytes:
    """The body of the 404 for one model that a key may not use."""
    name = path.rpartition("/")[2][:200]
    return error_body(404, f"the model `{name}` does not exist, or your key may not use it; see GET /v1/models")


def _never(account: Account, limits: Limits, size: RequestSize, output_tokens: int) -> KeyRefusal:
    if 0 < limits.streams < size.num_streams:
        message = f"{size}, and key {account.name} may have {limits.streams:,} at once; split the request"
        return KeyRefusal(400, "too_large", message, size.param)
    message = (
        f"the request may generate {output_tokens:,} tokens, and key {account.name} has {limits.tokens_per_minute:,} "
        "per minute, prompt included; ask for fewer (max_tokens, n)"
    )
    return KeyRefusal(400, "too_large", message, "max_tokens")


def _later(account: Account, limits: Limits, grant: Grant) -> KeyRefusal:
    why, retry_after_s = grant.reason, grant.retry_after_s or 1
    assert why is not None
    what = {
        "requests": f"its {limits.requests_per_minute:,} requests per minute",
        "tokens": f"its {limits.tokens_per_minute:,} tokens per minute",
        "streams": f"all of its {limits.streams:,} streams",
    }.get(why, "its limits")
    headers = [
        (b"retry-after", b"%d" % retry_after_s),
        (b"retry-after-ms", b"%d" % (1000 * retry_after_s)),
        *limit_headers(limits, grant.levels),
    ]
    message = f"key {account.name} has used {what}; try again in {retry_after_s} s"
    return KeyRefusal(429, why, message, None, headers)


def limit_headers(limits: Limits, levels: Levels) -> list[tuple[bytes, bytes]]:
    """What OpenAI's clients read of a key's limits; nothing of those that it has not."""
    headers = []
    for name, limit, level, reset_s in (
        ("requests", limits.requests_per_minute, levels.requests, levels.requests_reset_s),
        ("tokens", limits.tokens_per_minute, levels.tokens, levels.tokens_reset_s),
    ):
        if limit:
            for what, value in (("limit", limit), ("remaining", max(0, int(level))), ("reset", duration(reset_s))):
                headers.append((f"x-ratelimit-{what}-{name}".encode(), str(value).encode()))
    return headers


def duration(seconds: float) -> str:
    """As OpenAI writes it: 120ms, 7.66s, 6m0s."""
    if seconds < 1:
        return f"{round(1000 * seconds)}ms"
    minutes, rest_s = divmod(round(seconds, 2), 60)
    return f"{minutes:.0f}m{rest_s:g}s" if minutes else f"{rest_s:g}s"


def _models(body: bytes) -> list[Any]:
    """All models that a body may be about, None where it names none: of JSON, or of a form."""
    try:
        return [_asked_decoder.decode(body).model]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    try:  # vLLM's parser takes more than the standard: NaN, UTF-16
        value = json.loads(body)
    except (ValueError, RecursionError):
        return [found.strip().decode("latin-1") for found in _FORM_MODEL.findall(body)] or [None]
    return [value.get("model") if isinstance(value, dict) else None]


def _max_output_tokens(path: str, body: bytes) -> int:
    """What one stream of the request may write."""
    if path in request_size.POOLED_PATHS:
        return 0
    try:
        asked = _asked_decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return UNSAID_OUTPUT_TOKENS
    sampling = asked.sampling_params if isinstance(asked.sampling_params, dict) else {}
    said = (asked.max_completion_tokens, asked.max_tokens, asked.max_output_tokens, sampling.get("max_tokens"))
    return next((value for value in said if isinstance(value, int) and value > 0), UNSAID_OUTPUT_TOKENS)


def _about_prompt_tokens(body: bytes) -> int:
    media = [len(found[0]) for found in _DATA_URL.finditer(body)] if b"base64," in body else []
    return (len(body) - sum(media)) // BYTES_PER_TOKEN + MEDIUM_TOKENS * len(media)
