"""How many streams a request opens, read from its body before anything is opened.

A stream is one sequence in the engines: prompts (conversations, inputs, sides of a score) times choices. A beam search
holds as many as it has beams. Read is what vLLM 0.24 to 0.32 multiply by; they ignore `best_of`, and so does this. What
a body does not say counts as one: vLLM may cut an audio file or a long input into several.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from kervan.vendor.vllm_names import CHAT_PATH, COMPLETIONS_PATH

NULL = msgspec.Raw(b"null")
TEXTS, LISTS, OBJECTS = b'"', b"[", b"{"
INT64_MAX = 2**63 - 1
# A field of a form, as RFC 7578 sends it.
FORM_FIELD = rb'name="?%s"?[^\r\n]*\r?\n(?:[^\r\n]+\r?\n)*\r?\n([^\r\n]*)'
_FORM_N = re.compile(FORM_FIELD % b"n")
_FORM_BEAMS = re.compile(FORM_FIELD % b"use_beam_search")


@dataclass(frozen=True, slots=True)
class RequestSize:
    """`num_prompts`, of the kind that `noun` names, each with `n` choices. `param`: the field that is to blame."""

    num_prompts: int = 1
    n: int = 1
    noun: str = "prompt"
    param: str | None = None

    @property
    def num_streams(self) -> int:
        """Streams that it opens, at least 1."""
        return max(1, self.num_prompts) * max(1, self.n)

    def __str__(self) -> str:
        prompts = f"{self.num_prompts:,} {self.noun}{'' if self.num_prompts == 1 else 's'}"
        return f"{prompts}{f' x n={self.n:,}' if self.n > 1 else ''} = {self.num_streams:,} streams"


class _Chat(msgspec.Struct):
    n: Any = 1


class _Batch(msgspec.Struct):
    messages: msgspec.Raw = NULL
    n: Any = 1


class _Completion(msgspec.Struct):
    prompt: msgspec.Raw = NULL
    prompt_embeds: msgspec.Raw = NULL
    n: Any = 1


class _Tokens(msgspec.Struct):
    sampling_params: Any = None


class _Questions(msgspec.Struct):
    questions: dict[str, msgspec.Raw] | msgspec.Raw = NULL


class _Pooled(msgspec.Struct):
    """What is embedded or classified, and both sides of what is scored or ranked."""

    input: msgspec.Raw = NULL
    messages: msgspec.Raw = NULL
    data: msgspec.Raw = NULL
    texts: msgspec.Raw = NULL
    images: msgspec.Raw = NULL
    inputs: msgspec.Raw = NULL
    data_1: msgspec.Raw = NULL
    text_1: msgspec.Raw = NULL
    queries: msgspec.Raw = NULL
    data_2: msgspec.Raw = NULL
    text_2: msgspec.Raw = NULL
    documents: msgspec.Raw = NULL
    items: msgspec.Raw = NULL


class _Invocation(_Pooled):
    """Whatever vLLM finds in the body."""

    prompt: msgspec.Raw = NULL
    prompt_embeds: msgspec.Raw = NULL
    n: Any = 1


def _of_chat(body: _Chat) -> RequestSize:
    return RequestSize(n=_integer(body.n), param="n")


def _of_batch(body: _Batch) -> RequestSize:
    return RequestSize(max(1, _num_items(body.messages, LISTS)), _integer(body.n), "conversation", "messages")


def _of_completion(body: _Completion | _Invocation) -> RequestSize:
    num_prompts = _num_items(body.prompt, TEXTS + LISTS) + _num_items(body.prompt_embeds, TEXTS)
    return RequestSize(max(1, num_prompts), _integer(body.n), param="prompt" if num_prompts > 1 else "n")


def _of_tokens(body: _Tokens) -> RequestSize:
    sampling = body.sampling_params
    return RequestSize(n=_integer(sampling.get("n", 1)) if isinstance(sampling, dict) else 1, param="sampling_params")


def _of_questions(body: _Questions) -> RequestSize:
    questions = body.questions
    return RequestSize(len(questions) if isinstance(questions, dict) else 1, noun="question", param="questions")


def _of_pooled(body: _Pooled) -> RequestSize:
    sides = [
        max(_num_items(value, TEXTS + LISTS + OBJECTS) for value in values)
        for values in ((body.data_1, body.text_1, body.queries), (body.data_2, body.text_2, body.documents, body.items))
    ]
    if sides[1]:  # one stream for each pair, or with other models for each text
        return RequestSize(max(1, sides[0]) + sides[1] if max(sides) > 1 else 1, noun="text", param="documents")
    num_inputs = max(
        *(_num_items(value, TEXTS + LISTS) for value in (body.input, body.messages, body.data)),
        *(_num_items(value, TEXTS + LISTS + OBJECTS) for value in (body.texts, body.images, body.inputs)),
    )
    return RequestSize(max(1, num_inputs), noun="input", param="input")


def _of_invocation(body: _Invocation) -> RequestSize:
    return max(_of_completion(body), _of_pooled(body), key=lambda size: size.num_streams)


_Reader = tuple["msgspec.json.Decoder[Any]", Callable[[Any], RequestSize]]
_CHAT: _Reader = (msgspec.json.Decoder(_Chat), _of_chat)
_POOLED: _Reader = (msgspec.json.Decoder(_Pooled), _of_pooled)
# Nothing is generated there.
POOLED_PATHS = frozenset(
    {"/v1/embeddings", "/v2/embed", "/pooling", "/classify", "/score", "/v1/score", "/rerank", "/v1/rerank",
     "/v2/rerank", "/generative_scoring"}
)  # fmt: skip
_READERS: dict[str, _Reader] = {
    CHAT_PATH: _CHAT,
    CHAT_PATH + "/batch": (msgspec.json.Decoder(_Batch), _of_batch),
    COMPLETIONS_PATH: (msgspec.json.Decoder(_Completion), _of_completion),
    "/inference/v1/generate": (msgspec.json.Decoder(_Tokens), _of_tokens),
    "/v1/systemone": (msgspec.json.Decoder(_Questions), _of_questions),
    "/invocations": (msgspec.json.Decoder(_Invocation), _of_invocation),
    **dict.fromkeys(POOLED_PATHS, _POOLED),
}
_AUDIO_PREFIX = "/v1/audio/"
_list_decoder = msgspec.json.Decoder(list[msgspec.Raw])


def read(path: str, body: bytes) -> RequestSize:
    """The size of a POST, in about 1 us for an ordinary one. A body that vLLM must refuse counts as one stream."""
    if path.startswith(_AUDIO_PREFIX):
        return _of_form(body)
    reader = _READERS.get(path)
    if reader is None:  # responses, messages: one each
        return RequestSize()
    decoder, size = reader
    try:
        return size(decoder.decode(body))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    try:  # vLLM's parser takes more than the standard: NaN, 1e999, UTF-16
        return size(decoder.decode(json.dumps(json.loads(body, parse_constant=_no_number, parse_float=_finite))))
    except (ValueError, RecursionError):
        return RequestSize()


def _no_number(_name: str) -> None:
    """For NaN and Infinity, which the standard has no words for."""


def _finite(text: str) -> float | int:
    value = float(text)
    return value if math.isfinite(value) else INT64_MAX


def _num_items(value: msgspec.Raw, openings: bytes) -> int:
    """Of a list whose items begin with one of `openings`; 0 for null, 1 for anything else, such as token ids."""
    text = bytes(value)
    if not text.startswith(b"["):
        return 0 if text == b"null" else 1
    first = re.match(rb"\[\s*(.)", text, re.DOTALL)
    return len(_list_decoder.decode(text)) if first is not None and first[1] in openings else 1


def _integer(value: Any) -> int:
    """As vLLM reads a number: 2.0 and "2" are 2. What it refuses counts as 1."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return 1
    if not isinstance(value, int | float) or not value > 1:
        return 1
    return int(min(value, INT64_MAX))


def _of_form(body: bytes) -> RequestSize:
    n, beams = _FORM_N.search(body), _FORM_BEAMS.search(body)
    if n is None or beams is None or beams[1].strip().lower() not in (b"true", b"1", b"on", b"yes", b"t", b"y"):
        return RequestSize()
    return RequestSize(1, _integer(n[1].decode("latin-1")), "audio file", "n")
