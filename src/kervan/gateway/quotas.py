"""The limits of keys, kept by all gateways of a fleet together.

One gateway counts a key for all of them (`KeyMeter`): the one that `policy.quota.counting_gateway` names, so all agree
without a word. Others ask it before a request of the key is taken, one short message on the internal port, and tell it
when the request has ended. A key without limits costs nothing of this, nor does a fleet of one gateway. When another
one takes over, it begins with what the gateways that ask saw last. While it does not answer, each of the others gives
out its even share of the limits by itself, so that all of them together give out at most the limits once more.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import aiohttp
import msgspec

from kervan.fleet.directory import GatewayEntry
from kervan.gateway.keys import Account
from kervan.gateway.page import pinned
from kervan.gateway.relay import RELAY_HEADER
from kervan.policy.quota import Grant, KeyMeter, Levels, Limits, counting_gateway

logger = logging.getLogger(__name__)

QUOTA_PATH = "/kervan/quota"
ASK_TIMEOUT_S = 0.5
LOG_PERIOD_S = 10.0


class Message(msgspec.Struct, frozen=True):
    """What a gateway tells the one that counts `key`, the `number`th time.

    `ask`: may a request begin that needs `requests`, `tokens` and `streams`; else these go back. `held`: streams of the
    key here, without these. `seen`: the levels that it heard last, `seen_age_s` ago.
    """

    gateway: str
    key: str
    limits: Limits
    number: int
    ask: bool
    requests: int
    tokens: int
    streams: int
    held: int
    seen: Levels | None = None
    seen_age_s: float = 0.0


_message_decoder = msgspec.json.Decoder(Message)
_grant_decoder = msgspec.json.Decoder(Grant)


@dataclass(slots=True)
class _Known:
    """What this gateway knows of a key: how many messages it has sent and to whom, and the levels that it saw last."""

    account: Account
    number: int = 0
    levels: Levels | None = None
    levels_s: float = 0.0
    counted_by: str = ""


class Quotas:
    """The limits of all keys. `gateways`: those that the directory lists. `key`: `auth.relay_key` of the fleet."""

    def __init__(self, gateway_id: str, gateways: Callable[[], Sequence[GatewayEntry]], key: bytes) -> None:
        self._gateway_id = gateway_id
        self._gateways = gateways
        self._headers = {RELAY_HEADER.decode(): key.decode()}
        self._meters: dict[str, KeyMeter] = {}  # of the keys that are counted here
        self._shares: dict[str, KeyMeter] = {}  # of those whose counting gateway does not answer
        self._known: dict[str, _Known] = {}
        self._session: aiohttp.ClientSession | None = None
        self._telling: set[asyncio.Task[None]] = set()
        self._logged_s = -LOG_PERIOD_S

    async def close(self) -> None:
        """Tell nobody any more."""
        for task in self._telling:
            task.cancel()
        await asyncio.gather(*self._telling, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    def update(self) -> None:
        """Follow the directory: what gateways that are gone had is free, and who counts now hears of the streams."""
        present = {self._gateway_id, *(gateway.id for gateway in self._gateways())}
        for name, meter in list(self._meters.items()):
            if self._counting(name) is None:
                meter.keep_gateways(present)
            else:
                del self._meters[name]
        for name, known in self._known.items():
            if known.account.num_streams and known.counted_by != self._counted_by(name):
                self._tell(known.account, requests=0, tokens=0)

    async def ask(self, account: Account, tokens: int, streams: int) -> Grant:
        """Whether a request may begin that needs so many tokens and streams, which the account has then."""
        message = self._message(account, ask=True, requests=1, tokens=tokens, streams=streams)
        account.num_streams += streams  # others that ask meanwhile count it
        grant: Grant | None = None
        try:
            grant = await self._send(account.name, message)
        finally:
            if grant is None or not grant.is_granted:
                account.num_streams -= streams
                if self._known[account.name].number > message.number:  # others have told of these streams meanwhile
                    self._tell(account, requests=0, tokens=0)
        return grant

    def settle(self, account: Account, *, requests: int, tokens: int, streams: int) -> None:
        """A request has ended, and its streams with it: so much goes back, below 0 is taken."""
        account.num_streams -= streams
        self._tell(account, requests=requests, tokens=tokens)

    def hold(self, account: Account, streams: int) -> None:
        """Count streams that go on, whatever the limit: their clients came back to them."""
        account.num_streams += streams
        self._tell(account, requests=0, tokens=0)

    def _tell(self, account: Account, *, requests: int, tokens: int) -> None:
        limits = account.limits
        if not limits.streams and (limits == Limits() or not (requests or tokens)):
            return
        message = self._message(account, ask=False, requests=requests, tokens=tokens, streams=0)
        if self._counting(account.name) is None:
            self._take(message)
            return
        task = asyncio.create_task(self._send_told(account.name, message))
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def _send_told(self, name: str, message: Message) -> None:
        await self._send(name, message)

    def _message(self, account: Account, *, ask: bool, requests: int, tokens: int, streams: int) -> Message:
        known = self._known.setdefault(account.name, _Known(account))
        known.number += 1
        known.account, known.counted_by = account, self._counted_by(account.name)
        age_s = time.monotonic() - known.levels_s
        return Message(
            self._gateway_id, account.name, account.limits, known.number, ask, requests, tokens, streams,
            account.num_streams, known.levels, age_s,
        )  # fmt: skip

    def _counting(self, name: str) -> GatewayEntry | None:
        """The gateway that counts a key; None: this one."""
        gateways = {gateway.id: gateway for gateway in self._gateways()}
        chosen = counting_gateway(name, list({self._gateway_id, *gateways}))
        return None if chosen == self._gateway_id else gateways[chosen]

    def _counted_by(self, name: str) -> str:
        counting = self._counting(name)
        return self._gateway_id if counting is None else counting.id

    async def _send(self, name: str, message: Message) -> Grant:
        counting = self._counting(name)
        grant = None if counting is None else await self._post(counting, message)
        if grant is not None:
            self._shares.pop(name, None)
        elif counting is None:
            grant = self._take(message)
        else:
            return self._take_share(message)
        known = self._known[name]
        known.levels, known.levels_s = grant.levels, time.monotonic()
        return grant

    async def _post(self, counting: GatewayEntry, message: Message) -> Grant | None:
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=ASK_TIMEOUT_S)
            self._session = aiohttp.ClientSession(timeout=timeout, trust_env=False, headers=self._headers)
        try:
            place, pin = pinned(counting.internal_url)
            async with self._session.post(place + QUOTA_PATH, data=msgspec.json.encode(message), ssl=pin) as response:
                if response.status == 200:
                    return _grant_decoder.decode(await response.read())
                problem = f"it answers {response.status}"
        except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError) as error:
            problem = repr(error)
        now_s = time.monotonic()
        if now_s - self._logged_s > LOG_PERIOD_S:
            self._logged_s = now_s
            logger.warning("gateway %s, which counts key %s, was not asked: %s", counting.id, message.key, problem)
        return None

    def take(self, told: bytes) -> bytes:
        """The response to another gateway. Raises: msgspec.DecodeError."""
        return msgspec.json.encode(self._take(_message_decoder.decode(told)))

    def _take(self, message: Message) -> Grant:
        """Count here, for whoever asks."""
        now_s = time.monotonic()
        meter = self._meters.get(message.key)
        if meter is None:
            seen = message.seen
            meter = self._meters[message.key] = KeyMeter.new(message.limits, now_s, seen, message.seen_age_s)
        return _count(meter, message, message.limits, now_s)

    def _take_share(self, message: Message) -> Grant:
        now_s = time.monotonic()
        limits = message.limits.share(len({self._gateway_id, *(gateway.id for gateway in self._gateways())}))
        meter = self._shares.get(message.key)
        if meter is None:
            meter = self._shares[message.key] = KeyMeter.new(limits, now_s)
        return _count(meter, message, limits, now_s)


def _count(meter: KeyMeter, message: Message, limits: Limits, now_s: float) -> Grant:
    meter.change(limits, now_s)
    if message.ask:
        return meter.ask(
            message.gateway, now_s, requests=message.requests, tokens=message.tokens, streams=message.streams,
            held=message.held, number=message.number,
        )  # fmt: skip
    levels = meter.settle(
        message.gateway, now_s, requests=message.requests, tokens=message.tokens, held=message.held,
        number=message.number,
    )  # fmt: skip
    return Grant(levels)
