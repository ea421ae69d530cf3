"""How long answers get, learned from those that ended: the expected rest of one that has come so far already.

Lengths of answers have a heavy tail, so a mean says little; what counts is the rest, given what was generated. Answers
are counted in buckets by powers of two, each cut into four; within a bucket they are taken to be spread evenly. The
rest of an answer is then known to about an eighth of its length, which is enough to decide who moves.
"""

import bisect
import itertools
from collections.abc import Sequence

CUTS = 4
NUM_POWERS = 24  # up to 16 Mi tokens
# So few answers say nothing about the next.
MIN_ANSWERS = 20
# Old answers count less: all counts are halved when they reach this sum, so that a change of traffic is learned.
MAX_COUNT = 4096.0


def _edges() -> tuple[float, ...]:
    """Lower ends of the buckets, in tokens; the last is the upper end of them all."""
    edges = [0.0]
    for power in range(NUM_POWERS):
        edges += [2.0**power * (1 + cut / CUTS) for cut in range(CUTS)]
    return (*edges, 2.0**NUM_POWERS)


EDGES = _edges()
NUM_BUCKETS = len(EDGES) - 1


class LengthEstimate:
    """Counts of answers by their length in tokens. Deterministic; a few kilobytes."""

    def __init__(self, counts: Sequence[float] = ()) -> None:
        """`counts`: what `counts` of another estimate gave."""
        self._counts = list(counts) if len(counts) == NUM_BUCKETS else [0.0] * NUM_BUCKETS
        self._sum = sum(self._counts)
        self._totals: _Totals | None = None

    @property
    def counts(self) -> tuple[float, ...]:
        """Responses per bucket, `NUM_BUCKETS` numbers, aged; another estimate can begin with them."""
        return tuple(self._counts)

    def observe(self, output_tokens: int) -> None:
        """Count a response that ended after so many tokens. Leave out those that broke off: they would have gone on."""
        self._counts[_bucket(output_tokens)] += 1.0
        self._sum += 1.0
        self._age()

    def merge(self, other: "LengthEstimate") -> None:
        """Count what another has counted (another gateway's, or another fleet's of this model)."""
        self._counts = [mine + theirs for mine, theirs in zip(self._counts, other._counts, strict=True)]
        self._sum += other._sum
        self._age()

    def remaining_tokens(self, generated_tokens: int, *, max_remaining_tokens: int) -> float | None:
        """The mean rest of answers that got longer than `generated_tokens`, none counted beyond the maximum.

        None when fewer than MIN_ANSWERS got so long.
        """
        totals = self._cumulated()
        start, limit = float(generated_tokens), float(generated_tokens + max_remaining_tokens)
        shorter, tokens_of_shorter = totals.below(start)
        weight = self._sum - shorter
        if weight < MIN_ANSWERS:
            return None
        within, tokens_within = totals.below(limit)
        total = tokens_within - tokens_of_shorter + limit * (self._sum - within)
        return min(float(max_remaining_tokens), max(0.0, total / weight - start))

    def quantile_tokens(self, generated_tokens: int, q: float, *, max_remaining_tokens: int) -> float | None:
        """The rest that a share `q` (0 to 1) of such answers stays within; None as in `remaining_tokens`."""
        totals = self._cumulated()
        start = float(generated_tokens)
        shorter, _ = totals.below(start)
        weight = self._sum - shorter
        if weight < MIN_ANSWERS:
            return None
        return min(float(max_remaining_tokens), max(0.0, totals.length_at(shorter + q * weight) - start))

    def _age(self) -> None:
        self._totals = None
        while self._sum >= MAX_COUNT:
            self._counts = [count / 2 for count in self._counts]
            self._sum /= 2

    def _cumulated(self) -> "_Totals":
        if self._totals is None:
            self._totals = _Totals(self._counts)
        return self._totals


class _Totals:
    """Sums up to each bucket's lower end, so that a question costs the same for any number of buckets."""

    def __init__(self, counts: Sequence[float]) -> None:
        self._counts = tuple(counts)
        self._responses = [0.0, *itertools.accumulate(counts)]
        middles = (count * (EDGES[i] + EDGES[i + 1]) / 2 for i, count in enumerate(counts))
        self._tokens = [0.0, *itertools.accumulate(middles)]

    def below(self, length: float) -> tuple[float, float]:
        """How many responses are shorter than `length` tokens, and their tokens."""
        if length >= EDGES[-1]:
            return self._responses[-1], self._tokens[-1]
        bucket = _bucket(int(length))
        low, high = EDGES[bucket], EDGES[bucket + 1]
        inside = self._counts[bucket] * max(0.0, length - low) / (high - low)
        return self._responses[bucket] + inside, self._tokens[bucket] + inside * (low + max(low, length)) / 2

    def length_at(self, responses: float) -> float:
        """The length in tokens that so many responses are shorter than."""
        bucket = min(bisect.bisect_left(self._responses, responses), NUM_BUCKETS) - 1
        if bucket < 0:
            return 0.0
        low, high, count = EDGES[bucket], EDGES[bucket + 1], self._counts[bucket]
        return low if not count else low + (high - low) * min(1.0, (responses - self._responses[bucket]) / count)


def _bucket(tokens: int) -> int:
    """The bucket of a length: 0 for 0, then CUTS for each power of two."""
    if tokens < 1:
        return 0
    power = tokens.bit_length() - 1
    if power >= NUM_POWERS:
        return NUM_BUCKETS - 1
    return 1 + power * CUTS + (tokens - (1 << power)) * CUTS // (1 << power)
