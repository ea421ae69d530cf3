"""What the replicas' prefix caches have of the streams of one client: learned from where it sent them.

placed        the replica will have the prompt, and what was generated elsewhere before
first token   vLLM tells how much of it the cache had: with less than expected, it keeps less than was thought
ended         it has the answer too, up to the last token, which was never computed

Gateways tell each other, over the replica and with the signs of life that they send it: the hashes that are new to one
are in its next PING, and in the next PONGs to the others. A gateway that comes is told what was used last.
"""

import functools
import struct
from array import array
from collections.abc import Collection, Sequence

from kervan.fleet import wire
from kervan.fleet.codec import Codec
from kervan.fleet.link import ReplicaLink
from kervan.fleet.stream import Stream
from kervan.policy import prefix
from kervan.policy.prefix import Match, PrefixTable, Spans

# Engine methods that empty the prefix cache, on all replicas.
EMPTYING = frozenset({"reset_prefix_cache", "sleep"})
MOST_TARGETS = 8  # that a moving stream is told of


class Prefixes:
    """Of one client. `is_on`: streams are placed by prefix; false with `routing: least-load`, or without a cache."""

    def __init__(self, codec: Codec, secret: str, *, is_on: bool) -> None:
        self.is_on = is_on
        self._codec = codec
        self._key = prefix.fleet_key(secret)
        self._table = PrefixTable()
        self._block_size = 0  # of the replicas in the table: 0 while there is none
        self._num_replicas = 0

    def opened(self, link: ReplicaLink) -> None:
        """A replica is linked to, with what its cache may have unknown."""
        block_size, num_blocks = link.facts.block_size, link.facts.num_gpu_blocks
        if block_size <= 0 or num_blocks <= 0:
            return
        if not self._num_replicas:
            self._block_size = block_size
        if block_size == self._block_size:  # else of other settings than those before it, which will go soon
            self._num_replicas += link.replica_id not in self._table
            max_spans = num_blocks * block_size // prefix.span_tokens(block_size)
            self._table.add(link.replica_id, max_spans=max_spans)
            link.told = functools.partial(self._told, link)

    def lost(self, link: ReplicaLink) -> None:
        """A replica is gone; if it comes back, its cache is unknown."""
        if link.replica_id in self._table:
            self._table.remove(link.replica_id)
            self._num_replicas -= 1

    def emptied(self) -> None:
        """All caches were emptied, by an engine method."""
        self._table.clear()

    def match(self, stream: Stream) -> Match | None:
        """What each replica has of a stream's prompt and of what it has generated; None where that cannot be said."""
        if not (self.is_on and self._num_replicas):
            return None
        spans = self._spans(stream)
        if spans is None:
            return None
        spans.extend(stream.generated[spans.num_tokens - stream.prompt_tokens :])
        num_tokens = stream.prompt_tokens + len(stream.generated)
        return self._table.match(spans, max_tokens=max(0, num_tokens - 1) // self._block_size * self._block_size)

    def cached_tokens(self, stream: Stream, among: Collection[str]) -> dict[str, int]:
        """Tokens of a stream that some of these replicas have, those with the most of it; empty if none is known to."""
        match = self.match(stream)
        found: dict[str, int] = {}
        if match is None:
            return found
        for num_spans, members in match.levels():
            for replica_id in match.ids(members):
                if replica_id in among:
                    found[replica_id] = match.level_tokens(num_spans)
                if len(found) == MOST_TARGETS:
                    return found
        return found

    def _spans(self, stream: Stream) -> Spans | None:
        span_tokens = prefix.span_tokens(self._block_size)
        if stream.spans is None or stream.spans.span_tokens != span_tokens:
            content = self._codec.prompt(stream)
            if content is None:
                return None
            try:
                stream.spans = Spans(content, span_tokens, self._key)
            except struct.error:  # ids that no vocabulary has; the engine refuses them
                return None
        return stream.spans

    def placed(self, stream: Stream, link: ReplicaLink, match: Match) -> None:
        """A stream of which that was known was sent to a replica: the next one like it finds it there."""
        stream.expected_cached_tokens = match.tokens(link.replica_id)
        stream.possible_cached_tokens = match.most_tokens
        assert stream.spans is not None
        self._learn(link, stream.spans.hashes)

    def _learn(self, link: ReplicaLink, hashes: Sequence[int]) -> None:
        new = self._table.learn(link.replica_id, hashes)
        num_gateways = link.load.num_gateways
        if num_gateways > link.num_told:
            new = self._table.newest(link.replica_id, wire.MAX_NEWS_BYTES // prefix.HASH_BYTES)
        link.num_told = num_gateways
        if new and num_gateways > 1:
            link.news += array("Q", new).tobytes()
            del link.news[: -wire.MAX_NEWS_BYTES]

    def _told(self, link: ReplicaLink, prefixes: bytes) -> None:
        """Other gateways have sent these spans to a replica."""
        hashes = array("Q")
        hashes.frombytes(prefixes[: len(prefixes) // prefix.HASH_BYTES * prefix.HASH_BYTES])
        self._table.use(link.replica_id, hashes)

    def first_token(self, stream: Stream, link: ReplicaLink, cached_tokens: int | None) -> None:
        """A stream gave its first token there. `cached_tokens`: what the cache had of it, None if that is not told."""
        tally, expected_tokens = link.tally, stream.expected_cached_tokens
        tally.predicted_cached_tokens += expected_tokens
        tally.possible_cached_tokens += stream.possible_cached_tokens
        if cached_tokens is None:
            return
        tally.cached_tokens += cached_tokens
        if expected_tokens:
            link.load.see_cached(cached_tokens, expected_tokens)
            self._table.correct(link.replica_id, had_all=cached_tokens >= expected_tokens)

    def ended(self, stream: Stream, link: ReplicaLink) -> None:
        """A stream has ended there."""
        spans = stream.spans
        if spans is None or not self.is_on or link.replica_id not in self._table:
            return
        spans.extend(stream.generated[spans.num_tokens - stream.prompt_tokens : -1])
        self._learn(link, spans.hashes)
