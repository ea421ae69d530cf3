"""What each replica's prefix cache has of a prompt, as far as the streams sent there tell.

Nothing is asked of the engines: who routes every stream knows the tokens of all prompts and answers, and vLLM keeps
the KV cache of whole blocks until it needs their room, those first that were used longest ago. Tokens are hashed here
in spans of several of vLLM's blocks; each hash stands for all tokens up to the end of its span, so that the spans that
two prompts share are their first ones.
"""

import hashlib
import struct
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

# Of a span at the least. Spans as short as vLLM's blocks (16 tokens) would take four times the memory and time and tell
# 24 tokens more of a prompt on average.
SPAN_TOKENS = 64
HASH_BYTES = 8
# Spans that a replica has beyond its room before the oldest go, as a share of that: finding the oldest costs a search.
SURPLUS = 1 / 16
# How the room that a replica is taken to have changes with a prompt of which it had less than expected, and with one of
# which it had all; and the least of it, as a share of its KV cache. Chosen, not measured.
SHRINKING, REGROWTH, LEAST_SHARE = 0.95, 1.02, 1 / 8
TOKEN_BYTES = 4
ANYBODY = -1  # the bits of all replicas


def span_tokens(block_size: int) -> int:
    """Tokens of a span: the fewest whole blocks of `block_size` tokens that have `SPAN_TOKENS`."""
    return -(-SPAN_TOKENS // block_size) * block_size


def fleet_key(secret: str) -> bytes:
    """The key of a fleet's hashes: who does not know its secret cannot craft prompts whose hashes collide."""
    return hashlib.blake2s(secret.encode(), person=b"prefixes").digest()


@dataclass(frozen=True, slots=True)
class PromptContent:
    """What must be equal for two prompts to share blocks of vLLM's prefix cache.

    `scope`: texts that all of its blocks depend on, as the LoRA adapter and `cache_salt`. `items`: where images and the
    like begin, in tokens, and what tells each from others; in their order.
    """

    token_ids: Sequence[int]
    scope: tuple[str, ...] = ()
    items: tuple[tuple[int, str], ...] = ()


class Spans:
    """The hashes of a stream's whole spans, first its prompt's, then what it generates (`extend`).

    Takes 8 bytes for each span of tokens and what is left behind the last one.
    """

    __slots__ = ("_rest", "_state", "hashes", "num_tokens", "span_tokens")

    def __init__(self, content: PromptContent, span_tokens: int, key: bytes) -> None:
        """Raises: struct.error for token ids beyond 32 bits."""
        self.span_tokens = span_tokens
        self.num_tokens = 0
        self.hashes = array("Q")
        self._state = hashlib.blake2s(digest_size=HASH_BYTES, key=key)
        self._rest: list[int] = []
        for text in content.scope:
            self._take(text)
        begun = 0
        for offset, name in content.items:  # a span depends on the items that begin in it or before it
            end = max(begun, offset // span_tokens * span_tokens)
            self.extend(content.token_ids[begun:end])
            self._take(name)
            begun = end
        self.extend(content.token_ids[begun:] if begun else content.token_ids)

    def _take(self, text: str) -> None:
        data = text.encode("utf-8", "surrogatepass")
        self._state.update(struct.pack("<q", len(data)) + data)

    def extend(self, token_ids: Sequence[int]) -> None:
        """Take more tokens. Raises: struct.error for ids beyond 32 bits."""
        self.num_tokens += len(token_ids)
        tokens = [*self._rest, *token_ids] if self._rest else token_ids
        num_whole = len(tokens) // self.span_tokens * self.span_tokens
        if num_whole:
            data = struct.pack(f"<{num_whole}i", *tokens[:num_whole])
            size = self.span_tokens * TOKEN_BYTES
            update, digest = self._state.update, self._state.digest
            digests = []
            for begin in range(0, len(data), size):
                update(data[begin : begin + size])
                digests.append(digest())
            self.hashes.frombytes(b"".join(digests))
        self._rest = [*tokens[num_whole:]]


@dataclass(slots=True)
class _Held:
    """What one replica has: its spans, the oldest first, at most `max_spans` and a surplus. `bit` stands for it.

    `full_spans`: what its KV cache has room for.
    """

    bit: int
    full_spans: int
    max_spans: float
    spans: dict[int, None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Match:
    """How much of one prompt each replica has; looked up when asked, so it tells what the table knows then.

    `hashes`: of the prompt's spans. `num_spans`: of its first spans, those that any replica has; 0 where none has one.
    `max_tokens`: what vLLM takes from the cache at most. `owners`: the bits of the replicas that have a span; `bits`:
    of each replica; `replica_ids`: by the place of its bit.
    """

    hashes: Sequence[int]
    num_spans: int
    span_tokens: int
    max_tokens: int
    owners: Mapping[int, int]
    bits: Mapping[str, int]
    replica_ids: Sequence[str]

    def levels(self) -> Iterator[tuple[int, int]]:
        """Numbers of first spans, falling, each with the bits of the replicas that have just so many.

        Replicas that have none are in no level. Whoever needs only the first levels pays only for those.
        """
        if not self.num_spans:
            return
        hashes, owners = self.hashes, self.owners.get
        everyone, end, seen = owners(hashes[0], 0), self.num_spans, 0
        while True:
            members = owners(hashes[end - 1], 0)
            yield end, members & ~seen
            seen |= members
            if everyone & ~seen == 0 or end == 1:
                return
            # Back to the last span that others have too: in steps that double, then by halves.
            low, high, step = end - 2, end - 1, 1  # nobody but `seen` has `high`
            while low > 0 and owners(hashes[low], 0) & ~seen == 0:
                high, step = low, 2 * step
                low = max(0, low - step)
            while high - low > 1:
                middle = (low + high) // 2
                if owners(hashes[middle], 0) & ~seen:
                    low = middle
                else:
                    high = middle
            end = low + 1

    def tokens(self, replica_id: str) -> int:
        """Tokens of the prompt that the replica has, and need not compute."""
        bit = self.bits.get(replica_id, 0)
        return self.level_tokens(_num_first(self.hashes, self.num_spans, self.owners, bit)) if bit else 0

    def level_tokens(self, num_spans: int) -> int:
        """Tokens of the prompt that a replica with so many of its spans need not compute."""
        return min(num_spans * self.span_tokens, self.max_tokens)

    @property
    def most_tokens(self) -> int:
        """Tokens of the prompt that the replica with the most of it need not compute."""
        return self.level_tokens(self.num_spans)

    def ids(self, members: int, after: int = 0) -> Iterator[str]:
        """The replicas of a level, those first that come after the bit `after`."""
        later = members & ~((after << 1) - 1)
        for part in (later, members ^ later):
            rest = part
            while rest:
                bit = rest & -rest
                yield self.replica_ids[bit.bit_length() - 1]
                rest ^= bit


def _num_first(hashes: Sequence[int], most: int, owners: Mapping[int, int], bits: int) -> int:
    """Of `most` first spans, how many any of `bits` has, searched by halves: who has a span has those before it."""
    if not most or not owners.get(hashes[0], 0) & bits:
        return 0
    low, high = 0, most
    if owners.get(hashes[most - 1], 0) & bits:
        return most
    while high - low > 1:
        middle = (low + high) // 2
        if owners.get(hashes[middle], 0) & bits:
            low = middle
        else:
            high = middle
    return low + 1


class PrefixTable:
    """Which spans each replica has: those used last, as many as its KV cache has room for.

    `_owners` maps a span to the bits of the replicas that have it, so that one walk along a prompt's spans finds what
    all replicas have of it.
    """

    def __init__(self) -> None:
        self._owners: dict[int, int] = {}
        self._held: dict[str, _Held] = {}
        self._bits: dict[str, int] = {}
        self._ids: list[str] = []

    def __contains__(self, replica_id: str) -> bool:
        return replica_id in self._held

    def add(self, replica_id: str, *, max_spans: int) -> None:
        """A replica with an empty cache; one of that name that was there before is forgotten."""
        self.remove(replica_id)
        place = self._ids.index("") if "" in self._ids else len(self._ids)
        self._ids[place : place + 1] = [replica_id]
        self._bits[replica_id] = 1 << place
        self._held[replica_id] = _Held(1 << place, max(1, max_spans), max(1, max_spans))

    def remove(self, replica_id: str) -> None:
        """Forget a replica, if it is there."""
        held = self._held.pop(replica_id, None)
        if held is not None:
            self._disown(held, held.spans)
            self._ids[self._ids.index(replica_id)] = ""
            del self._bits[replica_id]

    def clear(self) -> None:
        """All caches are empty now; the replicas stay."""
        self._owners.clear()
        for held in self._held.values():
            held.spans.clear()

    def num_spans(self, replica_id: str) -> int:
        """Spans that a replica is taken to have."""
        return len(self._held[replica_id].spans)

    def learn(self, replica_id: str, hashes: Sequence[int]) -> list[int]:
        """A replica has, or will have next, these first spans of a prompt; which of them are new, the last one first.

        The last one counts as used first, as vLLM frees a prompt's blocks: the beginning, which others may share, is
        kept longest. Unknown replicas are passed over.
        """
        return self.use(replica_id, reversed(hashes))

    def use(self, replica_id: str, hashes: Iterable[int]) -> list[int]:
        """A replica has these spans, and used them in this order; which of them are new, in this order."""
        held = self._held.get(replica_id)
        if held is None:
            return []
        spans, bit, owners = held.spans, held.bit, self._owners
        new = []
        for span in hashes:
            if span in spans:
                del spans[span]
            else:
                others = owners.get(span)
                owners[span] = bit if others is None else others | bit
                new.append(span)
            spans[span] = None
        self._trim(held)
        return new

    def newest(self, replica_id: str, num_spans: int) -> list[int]:
        """The spans that a replica used last, at most so many, the last one at the end."""
        held = self._held.get(replica_id)
        return [] if held is None else [*islice(reversed(held.spans), num_spans)][::-1]

    def correct(self, replica_id: str, *, had_all: bool) -> None:
        """Take whether a replica had what it was expected to have of a prompt; unknown replicas are passed over.

        Nothing is to be taken off for that prompt: it has computed what was missing. But the replica keeps less than
        was thought: others send to it too, or its blocks are of several kinds.
        """
        held = self._held.get(replica_id)
        if held is not None and had_all:
            held.max_spans = min(held.full_spans, held.max_spans * REGROWTH)
        elif held is not None:
            held.max_spans = max(LEAST_SHARE * held.full_spans, held.max_spans * SHRINKING)
            self._trim(held)

    def _trim(self, held: _Held) -> None:
        spans = held.spans
        if len(spans) > held.max_spans * (1 + SURPLUS):
            oldest = list(islice(spans, len(spans) - int(held.max_spans)))
            self._disown(held, oldest)
            for span in oldest:
                del spans[span]

    def _disown(self, held: _Held, spans: Sequence[int] | dict[int, None]) -> None:
        owners, others = self._owners, ~held.bit
        for span in spans:
            rest = owners[span] & others
            if rest:
                owners[span] = rest
            else:
                del owners[span]

    def match(self, spans: Spans, *, max_tokens: int) -> Match:
        """What each replica has of a prompt: its first spans, up to the first one that is missing.

        A replica that has a span has those before it, as they are used after it: so the end of what it has is searched
        by halves.
        """
        num_spans = _num_first(spans.hashes, len(spans.hashes), self._owners, ANYBODY)
        return Match(spans.hashes, num_spans, spans.span_tokens, max_tokens, self._owners, self._bits, self._ids)
