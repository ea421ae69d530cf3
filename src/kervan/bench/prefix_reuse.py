"""How much of the prompts a prefix cache gave, and how much it could have given at most."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from kervan.config.workload import BLOCK_TOKENS

CACHE_BLOCK_TOKENS = 16  # vLLM's default: only whole blocks are found
Source = Literal["usage", "metrics"]

# A beginning of a prompt that other jobs may have too: (its name, tokens that it has more than the one before it).
Pieces = tuple[tuple[int, int], ...]


def whole_blocks(tokens: int) -> int:
    """Of so many equal tokens, those that are found."""
    return max(0, tokens) // CACHE_BLOCK_TOKENS * CACHE_BLOCK_TOKENS


def pieces_of_prefix(number: int, tokens: int) -> Pieces:
    """Shared prefix `number`, at the start of prompts that differ after it."""
    found = whole_blocks(tokens)
    return ((hash((-1, number)), found),) if found else ()


def pieces_of_trace(hash_ids: Sequence[int], input_tokens: int) -> Pieces:
    """The blocks of a trace row: two rows have in common what they begin with. The last token is always computed."""
    return tuple(_trace_pieces(hash_ids, input_tokens))


def _trace_pieces(hash_ids: Sequence[int], input_tokens: int) -> Iterator[tuple[int, int]]:
    name, before = 0, 0
    for place, hash_id in enumerate(hash_ids, 1):
        end = min(place * BLOCK_TOKENS, input_tokens)
        name = hash((name, hash_id, end - before))
        found = whole_blocks(min(end, input_tokens - 1)) - whole_blocks(before)
        if found > 0:
            yield name, found
        before = end


@dataclass(slots=True)
class PrefixReuse:
    """Sums over whole requests; mergeable over processes.

    `cached_tokens`: as the server told in `num_told` requests; vLLM says nothing where it found nothing.
    `reusable_tokens`: that this run had sent or been answered before. `num_unknown`: requests of which the client does
    not know what they have in common with others. `first_uses`: pieces by name, since only their first use costs.
    """

    num_told: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    reusable_tokens: int = 0
    num_unknown: int = 0
    first_uses: dict[int, int] = field(default_factory=dict)

    def add(self, *, prompt_tokens: int, cached_tokens: int | None, pieces: Pieces, history_tokens: int | None) -> None:
        """Count a request. `history_tokens`: of its prompt, those that its conversation had before."""
        self.prompt_tokens += prompt_tokens
        self.num_told += cached_tokens is not None
        self.cached_tokens += cached_tokens or 0
        if history_tokens is None:
            self.num_unknown += 1
            return
        self.reusable_tokens += whole_blocks(min(history_tokens, prompt_tokens - 1))
        for name, tokens in pieces:
            if name in self.first_uses:
                self.reusable_tokens += tokens
            else:
                self.first_uses[name] = tokens

    def merge(self, other: "PrefixReuse") -> None:
        """Count everything that `other` has counted: what both had as a first use was one in only one of them."""
        for name in ("num_told", "prompt_tokens", "cached_tokens", "reusable_tokens", "num_unknown"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for piece, tokens in other.first_uses.items():
            if piece in self.first_uses:
                self.reusable_tokens += tokens
            else:
                self.first_uses[piece] = tokens


@dataclass(frozen=True, slots=True)
class CachedShare:
    """What a run says of the prefix cache. Tokens; None: not known.

    `source`: the requests' own `usage`, or the server's counters, which include what other clients sent.
    """

    source: Source | None
    cached_tokens: float | None
    prompt_tokens: float
    possible_tokens: int | None

    @property
    def share(self) -> float | None:
        """Of all prompt tokens, those from the cache."""
        if self.cached_tokens is None or not self.prompt_tokens:
            return None
        return self.cached_tokens / self.prompt_tokens

    @property
    def of_possible(self) -> float | None:
        """Tokens from the cache by those that could have been; over 1 where earlier runs left the same prompts."""
        if self.cached_tokens is None or not self.possible_tokens:
            return None
        return self.cached_tokens / self.possible_tokens

    def to_dict(self) -> dict[str, Any]:
        """For JSON and records."""
        possible = self.possible_tokens
        return {
            "source": self.source,
            "cached_tokens": self.cached_tokens,
            "prompt_tokens": self.prompt_tokens,
            "share": self.share,
            "possible_tokens": possible,
            "possible_share": possible / self.prompt_tokens if possible is not None and self.prompt_tokens else None,
            "of_possible": self.of_possible,
        }


def cached_share(reuse: PrefixReuse, *, queries: float | None, hits: float | None) -> CachedShare:
    """`queries`, `hits`: prompt tokens by the server's counters during the run, None where it has none."""
    possible = reuse.reusable_tokens if not reuse.num_unknown else None
    if reuse.num_told:
        return CachedShare("usage", reuse.cached_tokens, reuse.prompt_tokens, possible)
    if queries is not None and hits is not None and queries > 0:
        return CachedShare("metrics", hits, queries, possible)
    return CachedShare(None, None, reuse.prompt_tokens, possible)
