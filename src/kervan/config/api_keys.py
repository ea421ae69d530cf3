"""API keys: who may ask a fleet, and how much. What is kept of a key is its digest, never the key.

A digest is plain SHA-256. A slow hash defends passwords, which can be guessed; a key of 256 random bits cannot, at any
speed, and each request would pay for the slowness. Keys that users choose themselves should be as random.
"""

import hashlib
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from kervan.errors import ConfigError

KEY_PREFIX = "kv-"
KEY_BYTES = 32
DIGEST_PREFIX = "sha256:"
MAX_KEYS = 10_000
MAX_LIMIT = 10**12
NAME_PATTERN = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_STORED = re.compile(rf"({NAME_PATTERN.pattern})={DIGEST_PREFIX}([0-9a-f]{{64}})")
_LIKE_STORED = re.compile(rf"[^=]*={DIGEST_PREFIX}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
VARIABLE = "KERVAN_API_KEYS"


class KeyEntry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """One key. A limit of 0 is none; without `models` it may use all. Times are Unix seconds, 0 is none.

    `requests_per_minute`, `tokens_per_minute`: of prompts and what is generated; `streams`: at once.
    """

    name: str
    digest: str
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    streams: int = 0
    models: tuple[str, ...] = ()
    created_s: int = 0
    expires_s: int = 0

    @property
    def is_limited(self) -> bool:
        """Whether requests of it have to be counted before they are taken."""
        return bool(self.requests_per_minute or self.tokens_per_minute or self.streams)


class KeyTable(msgspec.Struct, frozen=True):
    """The keys of a fleet as its gateways get them. `is_open`: none is needed; a table without keys lets nobody in.

    `problem`: why the keys of the fleet's file are not as the file has them.
    """

    entries: tuple[KeyEntry, ...] = ()
    is_open: bool = True
    problem: str = ""


OPEN = KeyTable()


def new_key() -> str:
    """A key of 256 random bits, of letters that URLs and shells take as they are."""
    return KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)


def digest(key: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def check_name(name: str, source: str) -> None:
    """Raises: ConfigError for a name that would not do as a metric's label and in a table."""
    if not NAME_PATTERN.fullmatch(name):
        raise ConfigError(
            f"{source}: {name[:80]!r} is no name of a key; use 1 to 63 letters, digits, '.', '_' and '-', such as web-1"
        )


def check_keys(keys: Sequence[str], source: str) -> None:
    """Raises: ConfigError for a key that no client can send as `Authorization: Bearer KEY`; it is not shown."""
    for place, key in enumerate(keys, 1):
        which = source if len(keys) == 1 else f"{source}: key {place} of {len(keys)}"
        if not key.strip():
            raise ConfigError(f"{which} is empty; give it a value, or leave it out")
        if _LIKE_STORED.match(key) and not _STORED.fullmatch(key):
            raise ConfigError(
                f"{which} has no SHA-256 after {DIGEST_PREFIX}; write NAME={DIGEST_PREFIX} and its 64 hexadecimal "
                "digits, in small letters"
            )
        if key != key.strip() or not all(" " <= letter <= "~" for letter in key):
            raise ConfigError(
                f"{which} begins or ends with white space, or has a line break or a character beyond ASCII, which "
                "clients cannot send in the header Authorization; use letters, digits and punctuation"
            )


def named_keys(text: str) -> dict[str, str]:
    """Name -> key, of `web:KEY,batch:KEY`, as KERVAN_API_KEYS has them.

    Raises: ConfigError, which shows no key.
    """
    found: dict[str, str] = {}
    parts = text.split(",")
    for place, part in enumerate(parts, 1):
        name, colon, key = part.strip().partition(":")
        if not colon:
            raise ConfigError(
                f"{VARIABLE}: entry {place} of {len(parts)} has no NAME:KEY form; write web:KEY,batch:KEY"
            )
        check_name(name, VARIABLE)
        check_keys([key], f"{VARIABLE}: the key of {name}")
        if name in found:
            raise ConfigError(f"{VARIABLE} has the name {name} twice; give each key a name of its own")
        found[name] = key
    return found


def stored(keys: Mapping[str, str]) -> tuple[str, ...]:
    """Named keys as settings keep them: `web=sha256:DIGEST`."""
    return tuple(f"{name}={DIGEST_PREFIX}{digest(key)}" for name, key in keys.items())


def hashed(settings: Sequence[str]) -> tuple[str, ...]:
    """The setting `api_keys` without keys: those that are not `stored` already become so, named by their place."""
    return tuple(
        setting if _STORED.fullmatch(setting) else stored({f"key-{place}": setting})[0]
        for place, setting in enumerate(settings, 1)
    )


def entries_of(settings: Sequence[str]) -> list[KeyEntry]:
    """The entries that the setting `api_keys` stands for; they have no limits."""
    entries = []
    for setting in hashed(settings):
        match = _STORED.fullmatch(setting)
        assert match is not None
        entries.append(KeyEntry(name=match[1], digest=match[3]))
    return entries


def table_of(settings: Sequence[str], of_file: Iterable[KeyEntry] | None, problem: str = "") -> KeyTable:
    """The keys of a fleet: those of its settings, and those of its file; None where it has no file.

    Of two with the same name or digest the one of the file counts, which may have limits.
    """
    of_settings = entries_of(settings)
    if of_file is None:
        return KeyTable(tuple(of_settings), not of_settings, problem)
    kept = {entry.name: entry for entry in of_file}
    digests = {entry.digest for entry in kept.values()}
    more = [entry for entry in of_settings if entry.name not in kept and entry.digest not in digests]
    return KeyTable((*kept.values(), *more), False, problem)


def read_entries(data: Any, source: str) -> list[KeyEntry]:
    """The entries of a parsed file of keys: a mapping with `keys`.

    Raises: ConfigError for whatever is not as `kervan keys` writes it.
    """
    if not isinstance(data, dict) or set(data) != {"keys"} or not isinstance(data["keys"], list):
        raise ConfigError(
            f"{source} holds no list `keys`, or more than that; move it away, and kervan keys add NAME begins another"
        )
    if len(data["keys"]) > MAX_KEYS:
        raise ConfigError(f"{source} has {len(data['keys']):,} keys, above {MAX_KEYS:,}; leave out those without use")
    entries: list[KeyEntry] = []
    for place, item in enumerate(data["keys"], 1):
        which = f"{source}: key {place}"
        try:
            entry = msgspec.convert(item, KeyEntry)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{which}: {_in_words(error)}; kervan keys add and limit write what is taken") from error
        check_entry(entry, which)
        entries.append(entry)
    for what in ("name", "digest"):
        values = [getattr(entry, what) for entry in entries]
        if twice := next((value for value in values if values.count(value) > 1), None) if _has_twice(values) else None:
            raise ConfigError(f"{source} has the {what} {twice[:64]} twice; leave out one of them")
    return entries


_WORDS = {"str": "text", "int": "a whole number", "array": "a list", "object": "a mapping", "bool": "true or false"}


def _in_words(error: msgspec.ValidationError) -> str:
    """What msgspec says, which names JSON's kinds and `$.streams`."""
    text = re.sub(
        r"Object (contains|missing)", lambda match: f"it {'has' if match[1] == 'contains' else 'lacks'}", str(error)
    )
    if match := re.fullmatch(r"Expected `(.+?)`, got `(.+?)`(?: - at `\$\.?(.*)`)?", text):
        expected, got = (_WORDS.get(kind.split(" ")[0], kind) for kind in match.groups()[:2])
        return f"{match[3] or 'it'} is {got}, not {expected}"
    return text


def _has_twice(values: list[str]) -> bool:
    return len(set(values)) < len(values)


def check_entry(entry: KeyEntry, source: str) -> None:
    """Raises: ConfigError for a name, digest or limit that is out of range."""
    check_name(entry.name, source)
    if not _DIGEST.fullmatch(entry.digest):
        raise ConfigError(
            f"{source}: the digest of {entry.name} is not 64 hexadecimal digits of SHA-256; "
            "kervan keys add makes a key and its digest"
        )
    for limit in ("requests_per_minute", "tokens_per_minute", "streams", "created_s", "expires_s"):
        if not 0 <= (value := getattr(entry, limit)) <= MAX_LIMIT:
            raise ConfigError(f"{source}: {limit}={value} of {entry.name} is outside 0..{MAX_LIMIT}; 0 is no limit")
    if any(not model.strip() for model in entry.models):
        raise ConfigError(f"{source}: models of {entry.name} has an empty name; leave it out")
