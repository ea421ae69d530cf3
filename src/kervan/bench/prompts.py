"""Prompts with exact token counts: the same ones for the same seed, built when they are needed."""

import array
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from kervan.bench.load import Endpoint, Load
from kervan.bench.prefix_reuse import Pieces, pieces_of_prefix, pieces_of_trace
from kervan.config.workload import BLOCK_TOKENS, TraceRow, parse_lengths
from kervan.errors import ConfigError
from kervan.facts.markup import json_value

encode = msgspec.json.encode


@dataclass(frozen=True, slots=True)
class Alphabet:
    """What prompts are made of.

    `vocab_size`: prompts are token ids below it (0: the server takes no ids). `words`: texts of exactly one token each,
    also when joined. `extra_tokens`: what the server adds to each text, such as a chat template.
    """

    vocab_size: int = 0
    words: tuple[str, ...] = ()
    extra_tokens: int = 0
    first_id: int = 10  # lower ids are often special tokens


@dataclass(frozen=True, slots=True)
class Request:
    """One request to send. `output_tokens` and `input_tokens` are exact; None: not known in advance.

    `pieces`: what its prompt begins with that other jobs may have as well; None: not known.
    """

    body: bytes
    output_tokens: int | None = None
    input_tokens: int | None = None
    pieces: Pieces | None = ()


class Prompts:
    """Builds the requests of a load for one server."""

    def __init__(self, load: Load, endpoint: Endpoint, alphabet: Alphabet) -> None:
        self._load = load
        self._endpoint = endpoint
        self._alphabet = alphabet
        self._isl = parse_lengths(load.isl)
        self._osl = parse_lengths(load.osl)
        self._rows = read_prompts(Path(load.prompts)) if load.prompts else []
        self._is_text = endpoint.api == "chat" or not alphabet.vocab_size
        if not self._rows and self._is_text and not alphabet.words:
            raise ConfigError("this server takes no token ids; give --tokenizer, so that texts have exact lengths")
        # What decides whether an answer's length is known in advance.
        self._is_exact = load.ignore_eos and bool(endpoint.sampling.get("ignore_eos", True))

    def request(self, job: int, turn: int, row: TraceRow | None, history: Sequence[dict[str, Any]]) -> Request:
        """Turn `turn` of job `job`; `history` has the messages before it.

        Calls at once of one turn are told apart by `turn`: the second one has `Load.turns` more, and so on.
        """
        rng = random.Random(f"{self._load.seed} {job} {turn}")
        output_tokens: int | None = self._osl.sample(rng)
        if self._rows:
            return self._from_file(self._rows[job % len(self._rows)], output_tokens)
        pieces: Pieces = ()
        if row is not None:
            output_tokens = max(1, row.output_tokens)
            units = self._of_trace(row, rng)
            pieces = pieces_of_trace(row.hash_ids, row.input_tokens)
        else:
            units = self._draw(rng, self._wanted(self._isl.sample(rng), turn))
            if self._load.prefixes and turn == 0:
                prefix = rng.randrange(self._load.prefixes)
                of_prefix = random.Random(f"{self._load.seed} prefix {prefix}")
                units = self._draw(of_prefix, self._load.prefix_tokens) + units
                pieces = pieces_of_prefix(prefix, self._load.prefix_tokens)
        num_tokens = len(units) + self._alphabet.extra_tokens if not history else None
        content: Any = "".join(units) if self._is_text else units
        return self._body(content, history, output_tokens, num_tokens, pieces)

    def _wanted(self, isl: int, turn: int) -> int:
        """Units to draw so that the whole first prompt has `isl` tokens."""
        if not self._is_text or turn:
            return isl
        if isl <= self._alphabet.extra_tokens:
            raise ConfigError(
                f"--isl {isl}: the server adds {self._alphabet.extra_tokens} tokens to each prompt "
                f"(template); use --isl {self._alphabet.extra_tokens + 1} or more"
            )
        return isl - self._alphabet.extra_tokens

    def _draw(self, rng: random.Random, count: int) -> list[Any]:
        numbers = array.array("I", rng.randbytes(4 * count))
        if sys.byteorder == "big":
            numbers.byteswap()
        if self._is_text:
            words = self._alphabet.words
            size = len(words)
            return [words[n % size] for n in numbers]
        first = min(self._alphabet.first_id, self._alphabet.vocab_size - 1)
        span = self._alphabet.vocab_size - first
        return [first + n % span for n in numbers]

    def _of_trace(self, row: TraceRow, rng: random.Random) -> list[Any]:
        """Equal blocks for equal hashes; the last block is shorter."""
        if not row.hash_ids:
            return self._draw(rng, row.input_tokens)
        units: list[Any] = []
        for number in row.hash_ids:
            units += self._draw(random.Random(f"{self._load.seed} block {number}"), BLOCK_TOKENS)
        return units[: row.input_tokens]

    def _from_file(self, row: dict[str, Any], output_tokens: int | None) -> Request:
        bound = row.get("max_tokens", row.get("output_tokens"))
        if bound is not None:
            output_tokens = int(bound)
        if "messages" in row:
            return self._body(None, row["messages"], output_tokens, None, None)
        ids = row.get("prompt_token_ids")
        return self._body(ids or row["prompt"], (), output_tokens, len(ids) if ids else None, None)

    def _body(
        self,
        content: Any,
        history: Sequence[dict[str, Any]],
        output_tokens: int | None,
        input_tokens: int | None,
        pieces: Pieces | None,
    ) -> Request:
        usage: dict[str, Any] = {"include_usage": True}
        if self._load.tokens_in_chunks:
            usage["continuous_usage_stats"] = True
        body: dict[str, Any] = {"model": self._endpoint.model, "stream": True, "stream_options": usage}
        if self._endpoint.api == "chat":
            body["messages"] = [*history, *([] if content is None else [{"role": "user", "content": content}])]
        else:
            body["prompt"] = content
        if output_tokens is not None:
            body["max_tokens"] = output_tokens
        if self._load.ignore_eos:
            body["ignore_eos"] = True
        body |= self._endpoint.sampling
        exact = output_tokens * int(body.get("n", 1) or 1) if self._is_exact and output_tokens else None
        return Request(encode(body), exact, input_tokens, pieces)


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """JSON lines with `prompt`, `messages` or `prompt_token_ids`, and perhaps `max_tokens`.

    Raises: ConfigError, with the line.
    """
    rows = []
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts {path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json_value(line)
            if not isinstance(row, dict) or not {"prompt", "messages", "prompt_token_ids"} & set(row):
                raise ValueError("no prompt, messages or prompt_token_ids")
            int(row.get("max_tokens", row.get("output_tokens")) or 1)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"prompts {path}, line {number}: {error}") from error
        rows.append(row)
    if not rows:
        raise ConfigError(f"prompts {path} has no rows")
    return rows


def check_api(rows: Sequence[dict[str, Any]], api: str) -> None:
    """Raises: ConfigError when rows and API do not fit."""
    for number, row in enumerate(rows, 1):
        if (api == "chat") != ("messages" in row):
            need = "--api chat" if "messages" in row else "--api completions"
            raise ConfigError(f"prompts, row {number} is for {need}; all rows must be for one API")


def http_request(endpoint: Endpoint, host: str, path: str, body: bytes) -> bytes:
    """A whole POST request."""
    head = [
        f"POST {path} HTTP/1.1",
        f"Host: {host}",
        "Content-Type: application/json",
        "Accept: text/event-stream",
        "User-Agent: kervan-bench",
        f"Content-Length: {len(body)}",
        *(f"{name}: {value}" for name, value in endpoint.headers),
    ]
    return "\r\n".join(head).encode("latin-1") + b"\r\n\r\n" + body
