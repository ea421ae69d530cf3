"""A load whose every token is checked: requests whose responses are known, and an observer that keeps the tokens."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from kervan.bench.exchange import Exchange
from kervan.bench.load import Load
from kervan.bench.load_client import BuildRequest
from kervan.bench.prompts import Prompts, Request
from kervan.bench.sse import Chunk
from kervan.config.workload import TraceRow
from kervan.twin.token_engine import TwinLimits, answer

# A request -> the tokens of its response.
ExpectedTokens = Callable[[Request], list[int]]
# Goes into each request: token ids come with each chunk, and the response is decided by the prompt.
SAMPLING: dict[str, Any] = {"return_token_ids": True, "temperature": 0}


class _CompletionBody(msgspec.Struct):
    prompt: list[int]
    max_tokens: int


def tokens_of_twins(limits: TwinLimits) -> ExpectedTokens:
    """A function that computes the token ids with which twins with these limits respond to a request."""
    decode = msgspec.json.Decoder(_CompletionBody).decode

    def expected(request: Request) -> list[int]:
        completion = decode(request.body)
        return answer(completion.prompt, completion.max_tokens, limits)

    return expected


def tokens_as_recorded(responses: Mapping[bytes, list[int]]) -> ExpectedTokens:
    """A function that looks up the token ids that were generated before; `responses`: by the body of the request."""
    return lambda request: responses[request.body]


@dataclass(slots=True, eq=False)
class CheckedStream:
    """A request that was sent or could not be, the token ids that came, and when each chunk that had some came."""

    exchange: Exchange
    tokens: list[int] = field(default_factory=list)
    tokens_s: list[float] = field(default_factory=list)


class StreamObserver:
    """Keeps the tokens of each stream, and hands it over when it has ended. A `RequestObserver`.

    `open`: those that have not ended. What `on_ended` raises ends the load.
    """

    def __init__(self, on_ended: Callable[[CheckedStream], None]) -> None:
        self.open: dict[Exchange, CheckedStream] = {}
        self._on_ended = on_ended

    def on_sent(self, exchange: Exchange) -> None:
        """Begin to keep its tokens."""
        self.open[exchange] = CheckedStream(exchange)

    def on_chunk(self, exchange: Exchange, chunk: Chunk, event: bytes, at_s: float) -> None:
        """Keep the chunk's tokens."""
        stream = self.open[exchange]
        for choice in chunk.choices:
            if choice.token_ids:
                stream.tokens += choice.token_ids
                stream.tokens_s.append(at_s)

    def on_done(self, exchange: Exchange) -> None:
        """Hand it over."""
        self._on_ended(self.open.pop(exchange))

    def on_failed(self, exchange: Exchange) -> None:
        """Hand it over, also if it was never sent."""
        self._on_ended(self.open.pop(exchange, CheckedStream(exchange)))


def only_some(prompts: Prompts, numbers: Sequence[int], seed: int) -> BuildRequest:
    """Requests with the prompts of these numbers only, again and again, in an order drawn from `seed`."""

    def build(job: int, turn: int, row: TraceRow | None, history: Sequence[dict[str, Any]]) -> Request:
        return prompts.request(random.Random(f"{seed} of {job}").choice(numbers), turn, row, history)

    return build


@dataclass(slots=True)
class RepeatedTrace:
    """The arrivals of a load's trace, from its start again when it is over, until `load.duration_s`.

    `max_model_len`: of prompt and response together. A row that is longer gets a shorter prompt, and if need be a
    shorter response; `num_cut` counts them.
    """

    load: Load
    max_model_len: int
    num_cut: int = 0

    def __iter__(self) -> Iterator[tuple[float, TraceRow]]:
        assert self.load.duration_s is not None, "else it has no end"
        # Without its bound, which would look like the trace's end.
        whole = replace(self.load, duration_s=None)
        shift_s = 0.0
        while True:
            count, last_s = 0, 0.0
            for last_s, row in whole.arrivals():
                if shift_s + last_s >= self.load.duration_s:
                    return
                assert row is not None
                yield shift_s + last_s, self._fit(row)
                count += 1
            # The first row comes again as long after the last one as rows are apart.
            shift_s += last_s + (last_s / (count - 1) if last_s else 1.0)

    def _fit(self, row: TraceRow) -> TraceRow:
        output = min(max(1, row.output_tokens), self.max_model_len - 1)
        prompt = min(row.input_tokens, self.max_model_len - output)
        if (prompt, output) == (row.input_tokens, max(1, row.output_tokens)):
            return row
        self.num_cut += 1
        return replace(row, input_tokens=prompt, output_tokens=output)
