"""POST /generate and POST /chat: small bodies in and out, over vLLM's OpenAI endpoints in the same process."""

from typing import Any, TypeVar

import msgspec

from kervan.gateway.answers import Answers
from kervan.gateway.asgi import BODY_HEADERS, JSON, ASGIApp, CollectedResponse, Message, Receive, Scope, Send, replay
from kervan.vendor.vllm_names import CHAT_PATH, COMPLETIONS_PATH

T = TypeVar("T")

MAX_TOKENS = 1 << 20  # above every context length; vLLM compares with the model's own
TEMPERATURE = (0.0, 2.0)


class GenerateRequest(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """Body of POST /generate."""

    prompt: str
    model: str | None = None
    max_tokens: int = 16
    temperature: float | None = None
    top_p: float | None = None
    stop: str | list[str] | None = None


class ChatRequest(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """Body of POST /chat. Messages go to vLLM as they came."""

    messages: list[msgspec.Raw]
    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    stream: bool = False


class GenerateResponse(msgspec.Struct):
    """Answer of POST /generate."""

    text: str
    tokens: int


class ChatResponse(msgspec.Struct):
    """Answer of POST /chat. With `stream`: events, each with a `content`, the last with `usage`, then [DONE]."""

    content: str
    usage: dict[str, Any] | None


class _Text(msgspec.Struct, frozen=True):
    content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    message: _Text = _Text()
    delta: _Text = _Text()
    finish_reason: str | None = None


class _VllmResponse(msgspec.Struct):
    """What we read of a completion, a chat completion, or one chunk of a streamed one."""

    choices: list[_Choice] = []
    usage: dict[str, Any] | None = None
    error: Any = None


_generate_decoder = msgspec.json.Decoder(GenerateRequest)
_chat_decoder = msgspec.json.Decoder(ChatRequest)
_completion_decoder = msgspec.json.Decoder(_VllmResponse)


class _FieldError(ValueError):
    """A request body breaks a rule; `param` names the field where one is to blame."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


async def generate(
    inner: ASGIApp, scope: Scope, receive: Receive, send: Send, *, model: str, body: bytes, answers: Answers
) -> None:
    """Respond with {"text", "tokens"}; vLLM's own errors pass unchanged."""
    try:
        request = _decode(_generate_decoder, body)
        _check_range("max_tokens", request.max_tokens, 1, MAX_TOKENS)
        _check_range("temperature", request.temperature, *TEMPERATURE)
        if request.top_p is not None and not 0 < request.top_p <= 1:
            raise _FieldError(f"top_p is {request.top_p}; it must be above 0 and at most 1", "top_p")
    except _FieldError as exc:
        await answers.error(scope, send, 400, str(exc), exc.param)
        return
    fields = {"model": model, "max_tokens": request.max_tokens} | msgspec.to_builtins(request)
    response = CollectedResponse()
    forwarded = _ForwardedRequest(scope, receive, COMPLETIONS_PATH, msgspec.json.encode(fields))
    await inner(forwarded.scope, forwarded.receive, response.send)
    if forwarded.is_gone:
        return
    if response.status != 200:
        await response.forward(send)
        return
    completion = _completion_decoder.decode(response.body)
    tokens = (completion.usage or {}).get("completion_tokens", 0)
    generated = GenerateResponse(completion.choices[0].text or "", tokens)
    await response.forward(send, msgspec.json.encode(generated))


async def chat(
    inner: ASGIApp, scope: Scope, receive: Receive, send: Send, *, model: str, body: bytes, answers: Answers
) -> None:
    """Respond with {"content", "usage"}, or the same as server-sent events; vLLM's own errors pass unchanged."""
    try:
        request = _decode(_chat_decoder, body)
        if not request.messages:
            raise _FieldError("messages is empty; it must have at least 1 message", "messages")
        _check_range("max_tokens", request.max_tokens, 1, MAX_TOKENS)
        _check_range("temperature", request.temperature, *TEMPERATURE)
    except _FieldError as exc:
        await answers.error(scope, send, 400, str(exc), exc.param)
        return
    fields: dict[str, Any] = {"model": request.model or model, "messages": request.messages}
    if request.max_tokens is not None:
        fields["max_tokens"] = request.max_tokens
    if request.temperature is not None:
        fields["temperature"] = request.temperature
    if request.stream:
        fields |= {"stream": True, "stream_options": {"include_usage": True}}
    forwarded = _ForwardedRequest(scope, receive, CHAT_PATH, msgspec.json.encode(fields))
    if request.stream:
        await inner(forwarded.scope, forwarded.receive, _ChatEvents(send).send)
        return
    response = CollectedResponse()
    await inner(forwarded.scope, forwarded.receive, response.send)
    if forwarded.is_gone:
        return
    if response.status != 200:
        await response.forward(send)
        return
    completion = _completion_decoder.decode(response.body)
    # Content is null when a reasoning parser has put all text elsewhere.
    content = completion.choices[0].message.content or ""
    await response.forward(send, msgspec.json.encode(ChatResponse(content, completion.usage)))


class _ForwardedRequest:
    """One request of ours to vLLM's app: what the client sent, with another path and body."""

    def __init__(self, scope: Scope, receive: Receive, path: str, body: bytes) -> None:
        kept = [pair for pair in scope["headers"] if pair[0] not in BODY_HEADERS]
        headers = [*kept, (b"content-type", JSON), (b"content-length", b"%d" % len(body))]
        self.scope: Scope = {**scope, "path": path, "raw_path": path.encode(), "query_string": b"", "headers": headers}
        self.is_gone = False
        self._replayed = replay(body, receive)

    async def receive(self) -> Message:
        message = await self._replayed()
        if message["type"] == "http.disconnect":
            self.is_gone = True
        return message


class _ChatEvents:
    """Rewrites vLLM's chat chunks as they pass. Events may be split anywhere across ASGI messages."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._is_stream = False
        self._rest = b""
        self._usage: dict[str, Any] | None = None
        self._finish_reason: str | None = None
        self._has_failed = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._is_stream = message["status"] == 200
        elif self._is_stream:
            *events, self._rest = (self._rest + message.get("body", b"")).split(b"\n\n")
            body = b"".join(map(self._rewrite, events))
            more = message.get("more_body", False)
            if not body and more:
                return
            message = {"type": "http.response.body", "body": body, "more_body": more}
        await self._send(message)

    def _rewrite(self, event: bytes) -> bytes:
        if not event.startswith(b"data:"):
            return event + b"\n\n"  # a comment: vLLM's keep-alive
        data = event[5:].strip()
        if data == b"[DONE]":
            last = {"content": "", "usage": self._usage, "finish_reason": self._finish_reason}
            return (b"" if self._has_failed else _event(last)) + b"data: [DONE]\n\n"
        chunk = _completion_decoder.decode(data)
        if chunk.error is not None:
            self._has_failed = True
            return event + b"\n\n"
        self._usage = chunk.usage or self._usage
        if not chunk.choices:
            return b""
        choice = chunk.choices[0]
        self._finish_reason = choice.finish_reason or self._finish_reason
        return _event({"content": choice.delta.content}) if choice.delta.content else b""


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def _decode(decoder: "msgspec.json.Decoder[T]", body: bytes) -> T:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise _FieldError(f"the body is not accepted: {exc}") from None


def _check_range(name: str, value: float | None, low: float, high: float) -> None:
    """Both ends are allowed; None is "not given"."""
    if value is not None and not low <= value <= high:
        raise _FieldError(f"{name} is {str(value)[:40]}; it must be from {low:g} to {high}", name)
