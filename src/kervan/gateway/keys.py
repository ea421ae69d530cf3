"""Who sends a request: API keys found by their digests, and what each has used at this gateway.

The table comes from the fleet's directory, and changes while requests are in flight: one that has been let in ends as
it would have.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from kervan.config.api_keys import OPEN, KeyEntry, KeyTable
from kervan.fleet.usage import ANYBODY, UNKNOWN, KeyUsage, UsageByKey, UsageByModel
from kervan.gateway.asgi import Scope, header
from kervan.policy.quota import Limits

# Why a request of a key was not worked on.
Rejection = Literal["key", "expired", "model", "requests", "tokens", "streams", "too_large"]


@dataclass(slots=True, eq=False)
class Account:
    """One key at this gateway. `entry`: None where no key is needed, or for those that nobody knows."""

    name: str
    entry: KeyEntry | None = None
    usage: UsageByModel = field(default_factory=dict)
    rejected: Counter[Rejection] = field(default_factory=Counter)
    num_streams: int = 0

    @property
    def limits(self) -> Limits:
        """Of the key."""
        entry = self.entry
        if entry is None:
            return Limits()
        return Limits(entry.requests_per_minute, entry.tokens_per_minute, entry.streams)

    @property
    def total(self) -> KeyUsage:
        """Over all models."""
        total = KeyUsage(rejected=self.rejected.total(), streams=self.num_streams)
        for usage in self.usage.values():
            total.add(usage)
        return total

    def spent(self, model: str, usage: KeyUsage) -> None:
        """Count it."""
        self.usage.setdefault(model, KeyUsage()).add(usage)


class KeyRing:
    """The keys that open a gateway. `clock`: Unix time."""

    def __init__(self, table: KeyTable = OPEN, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._anybody, self._unknown = Account(ANYBODY), Account(UNKNOWN)
        self._by_digest: dict[bytes, Account] = {}
        self._by_name: dict[str, Account] = {}
        self._revoked: dict[str, Account] = {}  # what they have used stays used
        self._table = KeyTable(is_open=False)  # until the line below
        self.update(table)

    @property
    def is_open(self) -> bool:
        """Whether no key is needed."""
        return self._table.is_open

    def update(self, table: KeyTable) -> None:
        """Other keys, or other limits of the same, from now on."""
        if table == self._table:
            return
        self._table = table
        before, self._by_name, self._by_digest = self._by_name, {}, {}
        for entry in table.entries:
            account = before.pop(entry.name, None) or self._revoked.pop(entry.name, None) or Account(entry.name)
            account.entry = entry
            self._by_name[entry.name] = account
            self._by_digest[bytes.fromhex(entry.digest)] = account
        self._revoked |= before

    def find(self, scope: Scope) -> Account | None:
        """Whose request it is; None for one without a key of the fleet. `expired` says whether its key may enter.

        The time does not tell how much of a key is right: looked up is its digest, which nobody can choose.
        """
        if self._table.is_open:
            return self._anybody
        scheme, _, key = header(scope, b"authorization").partition(b" ")
        if scheme.lower() != b"bearer":
            return None
        return self._by_digest.get(hashlib.sha256(key.strip()).digest())

    def named(self, name: str) -> Account | None:
        """The account of a name, as another gateway of the fleet tells it; None for one that is not known here yet."""
        if name == self._anybody.name:
            return self._anybody
        return self._by_name.get(name) or self._revoked.get(name)

    def is_expired(self, account: Account) -> bool:
        """Whether the time of its key is over."""
        entry = account.entry
        return entry is not None and 0 < entry.expires_s <= self._clock()

    def refuse(self, account: Account | None, why: Rejection) -> None:
        """Count a request that was not let in."""
        (account or self._unknown).rejected[why] += 1

    def accounts(self) -> list[Account]:
        """All that have used anything, or may; revoked ones only while they have streams."""
        leaving = [account for account in self._revoked.values() if account.num_streams]
        special = [account for account in (self._anybody, self._unknown) if account.usage or account.rejected]
        return [*self._by_name.values(), *leaving, *special]

    def usage(self, model: str) -> UsageByKey:
        """What all have used since the gateway's start, revoked ones too, by model.

        `model`: what the fleet serves. What went to no adapter counts there, and what opened no stream.
        """
        told: UsageByKey = {}
        accounts = {account.name: account for account in (*self._revoked.values(), *self.accounts())}
        for name, account in accounts.items():
            own = KeyUsage(rejected=account.rejected.total(), streams=account.num_streams)
            models = dict(account.usage)
            own.add(models.pop("", KeyUsage()))
            if own != KeyUsage():
                models[model] = own
            if models:
                told[name] = models
        return told
