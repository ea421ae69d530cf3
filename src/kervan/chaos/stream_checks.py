"""What has become of the streams, counted as they end."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kervan.chaos import effects, verify
from kervan.chaos.checked_load import CheckedStream, ExpectedTokens
from kervan.chaos.effects import Disruption

# A response with such an error came to its end; what is wrong with its tokens is counted as tokens.
TOKEN_ERRORS = ("wrong_length", "duplicated", "empty")


@dataclass(slots=True)
class StreamChecks:
    """`disruptions` is the list that the run adds to. `longest_s`: each stream's longest gap in each window."""

    expected: ExpectedTokens
    disruptions: Sequence[Disruption]
    on_fault: Callable[[str], None] = lambda _: None
    streams: int = 0
    tokens: int = 0
    broken: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    longest_s: list[float] = field(default_factory=list)
    _different: list[tuple[list[int], list[int], bool]] = field(default_factory=list)

    def add(self, stream: CheckedStream) -> None:
        """Count one stream that has ended, or that was never sent."""
        exchange, tokens = stream.exchange, stream.tokens
        self.streams += 1
        if not exchange.was_sent:
            self._break(str(exchange.error), exchange.message)
            return
        self.tokens += len(tokens)
        expected = self.expected(exchange.request)
        is_right = tokens == expected
        is_whole = exchange.error is None or (exchange.error in TOKEN_ERRORS and not is_right)
        if not is_whole:
            self._break(str(exchange.error), exchange.message)
        if not is_right and (is_whole or tokens != expected[: len(tokens)]):
            self._different.append((expected, tokens, is_whole))
            self.on_fault(f"a stream has other tokens than it should: {len(tokens)} came of {len(expected)}")
        self.longest_s += effects.longest_gaps_s(exchange.sent_s, stream.tokens_s, self.disruptions)

    def _break(self, kind: str, message: str) -> None:
        self.broken += 1
        self.errors[kind] = self.errors.get(kind, 0) + 1
        if kind not in self.messages:
            self.messages[kind] = message
            self.on_fault(f"a stream broke: {kind}: {message}")

    def difference(self) -> verify.Difference:
        """Over all streams; takes a while if many differ."""
        total = verify.Difference()
        for expected, tokens, is_whole in self._different:
            total += verify.compare(expected, tokens, is_whole=is_whole)
        return total
