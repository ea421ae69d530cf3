"""What an OpenAI-compatible server streams: server-sent events, and which of them carry tokens."""

from typing import Any

import msgspec


class EventParser:
    """Server-sent events from pieces cut anywhere. Lines end in LF, CRLF or CR; comments and other fields are skipped.

    Source: HTML Living Standard, 9.2.6.
    """

    __slots__ = ("_data", "_had_cr", "_tail")

    def __init__(self) -> None:
        self._tail = b""
        self._data: list[bytes] = []
        self._had_cr = False

    @property
    def is_between_events(self) -> bool:
        """Whether the next piece begins a line, and an event."""
        return not (self._tail or self._data or self._had_cr)

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of each event that became complete."""
        if self._had_cr and piece[:1] == b"\n":
            piece = piece[1:]  # the second half of a CRLF
        if not piece:
            return []
        text = self._tail + piece
        self._had_cr = text[-1:] == b"\r"
        *lines, self._tail = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        events = []
        for line in lines:
            if not line:
                if self._data:
                    events.append(b"\n".join(self._data))
                    self._data.clear()
            elif line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
        return events


class PromptTokensDetails(msgspec.Struct, gc=False):
    """Of the tokens of a prompt, those that the prefix cache had."""

    cached_tokens: int | None = None


class Usage(msgspec.Struct, gc=False):
    """Token counts by the server, of one request."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: PromptTokensDetails | None = None


class Delta(msgspec.Struct, gc=False):
    """What a chunk of a chat brings."""

    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    tool_calls: list[msgspec.Raw] | None = None


class ChunkChoice(msgspec.Struct, gc=False):
    """One of the `n` choices in a chunk. `delta`: of chats, `text`: of completions."""

    index: int = 0
    text: str | None = None
    delta: Delta | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None


class Chunk(msgspec.Struct, gc=False):
    """One streamed object of /v1/completions or /v1/chat/completions, as far as a load tester needs it."""

    choices: list[ChunkChoice] = []
    usage: Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(Chunk).decode
_decode_all = msgspec.json.Decoder(list[Chunk]).decode


def decode(data: bytes) -> Chunk:
    """The chunk in the data of an event. Raises: ValueError when `data` is no such object."""
    return _decode(data)


def decode_all(data: bytes) -> list[Chunk]:
    """As `decode`, for a JSON array of such objects."""
    return _decode_all(data)


def carries_token(choice: ChunkChoice) -> bool:
    """Whether a choice of a chunk brings at least one token.

    Not so a chat's opening (a role and no text) and a closing one (a finish reason and nothing else). A completion's
    chunk without text does: a token may be part of a character. A closing chunk may stand for an unseen end-of-text
    token; whoever knows the server's token count can tell.
    """
    delta = choice.delta
    if delta is None:
        return bool(choice.text) or bool(choice.token_ids) or (choice.text is not None and choice.finish_reason is None)
    if delta.content or delta.reasoning or delta.reasoning_content or delta.tool_calls or delta.refusal:
        return True
    return bool(choice.token_ids) or (choice.finish_reason is None and delta.role is None and delta.content is not None)


def is_reasoning(choice: ChunkChoice) -> bool:
    """Whether what a choice brings is reasoning, not the answer."""
    delta = choice.delta
    return delta is not None and not delta.content and bool(delta.reasoning or delta.reasoning_content)
