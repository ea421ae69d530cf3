"""What a check says, and the words that checks share."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

VerdictWord = Literal["pass", "warn", "fail", "skipped"]


@dataclass(frozen=True, slots=True)
class Check:
    """`cause`: what was found, or why it was not looked at. `fix`: empty unless something is to be done."""

    name: str
    verdict: VerdictWord
    cause: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Advice:
    """A variable to set, or with an empty value to unset, and why."""

    name: str
    value: str
    reason: str


def passed(name: str, cause: str) -> Check:
    return Check(name, "pass", cause)


def skipped(name: str, cause: str) -> Check:
    return Check(name, "skipped", cause)


def warned(name: str, cause: str, fix: str) -> Check:
    return Check(name, "warn", cause, fix)


def failed(name: str, cause: str, fix: str) -> Check:
    return Check(name, "fail", cause, fix)


def listed(words: Iterable[object], most: int = 6) -> str:
    """The first words joined by commas, and how many more there are."""
    texts = [str(word) for word in words]
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def matches(pattern: str, name: str) -> bool:
    """Whether NCCL_SOCKET_IFNAME or NCCL_IB_HCA, as NCCL reads them, takes a name (mlx5_0:1 with its port).

    A list of prefixes; of exact names after `=`; of what is left out after `^`.
    """
    text = pattern.strip()
    is_excluded = text.startswith("^")
    text = text.removeprefix("^")
    is_exact = text.startswith("=")
    words = [word.strip() for word in text.removeprefix("=").split(",") if word.strip()]
    device = name.partition(":")[0]
    is_hit = any(_is_hit(word, name, device, is_exact) for word in words)
    return is_hit != is_excluded


def _is_hit(word: str, name: str, device: str, is_exact: bool) -> bool:
    wanted, colon, _ = word.partition(":")
    if colon and ":" in name and word.partition(":")[2] != name.partition(":")[2]:
        return False
    return device == wanted if is_exact else device.startswith(wanted)
