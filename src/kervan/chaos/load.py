"""Streams whose every token is checked: `kervan bench`'s client, with prompts whose answers are known."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from kervan.bench.events import Chunk
from kervan.bench.exchange import Exchange
from kervan.bench.load import Load, Target
from kervan.bench.prompts import Alphabet, Ask, Prompts
from kervan.bench.worker import Driver, Share
from kervan.config.workload import TraceRow
from kervan.twin.token_engine import TwinLimits, answer

# A request -> the tokens of its answer.
Truth = Callable[[Ask], list[int]]
# Goes into each request: token ids come with each chunk, and the answer is decided by the prompt.
SAMPLING: dict[str, Any] = {"return_token_ids": True, "temperature": 0}


class _Asked(msgspec.Struct):
    prompt: list[int]
    max_tokens: int


def twin_truth(limits: TwinLimits) -> Truth:
    """What twins with these limits answer."""
    decode = msgspec.json.Decoder(_Asked).decode

    def truth(ask: Ask) -> list[int]:
        asked = decode(ask.body)
        return answer(asked.prompt, asked.max_tokens, limits)

    return truth


def seen_truth(answers: Mapping[bytes, list[int]]) -> Truth:
    """What was answered before; `answers` by the request's body."""
    return lambda ask: answers[ask.body]


class CheckedExchange(Exchange):
    """Keeps the token ids, and when each chunk that had some came."""

    __slots__ = ("tokens", "tokens_s")

    def __init__(self, index: int, arrival_s: float, exact_tokens: int | None) -> None:
        super().__init__(index, arrival_s, exact_tokens)
        self.tokens: list[int] = []
        self.tokens_s: list[float] = []

    def _on_chunk(self, chunk: Chunk, event: bytes, at_s: float) -> None:
        for choice in chunk.choices:
            if choice.token_ids:
                self.tokens += choice.token_ids
                self.tokens_s.append(at_s)
        super()._on_chunk(chunk, event, at_s)


class _SomePrompts(Prompts):
    """Only the prompts of some numbers, in an order drawn from the seed."""

    def __init__(self, load: Load, target: Target, alphabet: Alphabet, numbers: Sequence[int]) -> None:
        super().__init__(load, target, alphabet)
        self._numbers = numbers

    def ask(self, job: int, turn: int, row: TraceRow | None, history: Sequence[dict[str, Any]]) -> Ask:
        return super().ask(random.Random(f"{self._load.seed} of {job}").choice(self._numbers), turn, row, history)


class CheckedDriver(Driver):
    """Hands over every answer with its request; None for one that could not be sent.

    `numbers`: the prompts to ask, again and again; without it each one is new.
    """

    def __init__(
        self,
        share: Share,
        start_s: float,
        on_answer: Callable[[Ask, CheckedExchange | None], None],
        numbers: Sequence[int] = (),
    ) -> None:
        super().__init__(share, start_s)
        self._on_answer = on_answer
        self._failure: Exception | None = None
        if numbers:
            self._prompts = _SomePrompts(share.load, share.target, share.alphabet, numbers)

    def prompt(self, number: int) -> Ask:
        return self._prompts.ask(number, 0, None, ())

    async def run(self) -> None:
        """Raises: what `on_answer` raised; nothing more is sent then."""
        await super().run()
        if self._failure is not None:
            raise self._failure

    def _new_exchange(self, number: int, arrival_s: float, ask: Ask) -> Exchange:
        return CheckedExchange(number, arrival_s, ask.output_tokens)

    async def _exchange(self, number: int, arrival_s: float, ask: Ask) -> Exchange | None:
        exchange = await super()._exchange(number, arrival_s, ask)
        assert exchange is None or isinstance(exchange, CheckedExchange)
        try:
            self._on_answer(ask, exchange)
        except Exception as error:  # noqa: BLE001 - raised by `run`; nobody awaits this task's result
            self._failure = self._failure or error
            self.end()
        return exchange


class TraceDriver(CheckedDriver):
    """Asks as a trace says, from its start again when it is over. `max_model_len`: prompt and answer together.

    A row that is longer gets a shorter prompt, and if need be a shorter answer; `cut` counts them.
    """

    def __init__(
        self,
        share: Share,
        start_s: float,
        on_answer: Callable[[Ask, CheckedExchange | None], None],
        max_model_len: int,
    ) -> None:
        super().__init__(share, start_s, on_answer)
        self._max_model_len = max_model_len
        self.cut = 0

    def jobs(self) -> Iterator[tuple[int, float, TraceRow | None]]:
        assert self._load.duration_s is not None, "else it has no end"
        # Without its bound, which would look like the trace's end.
        whole = replace(self._load, duration_s=None)
        number, shift_s = 0, 0.0
        while True:
            first, last_s = number, 0.0
            for last_s, row in whole.arrivals():
                if shift_s + last_s >= self._load.duration_s:
                    return
                assert row is not None
                yield number, shift_s + last_s, self._fit(row)
                number += 1
            # The first row comes again as long after the last one as rows are apart.
            shift_s += last_s + (last_s / (number - first - 1) if last_s else 1.0)

    def _fit(self, row: TraceRow) -> TraceRow:
        output = min(max(1, row.output_tokens), self._max_model_len - 1)
        prompt = min(row.input_tokens, self._max_model_len - output)
        if (prompt, output) == (row.input_tokens, max(1, row.output_tokens)):
            return row
        self.cut += 1
        return replace(row, input_tokens=prompt, output_tokens=output)
