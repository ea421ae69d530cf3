"""What is found out about a server before it is loaded: its model, and prompts whose length it agrees with."""

import difflib
import http.client
import json
import random
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kervan.bench.exchange import Exchange
from kervan.bench.load import PATHS, Endpoint, Load
from kervan.bench.prompts import Alphabet, Request, check_api, encode, read_prompts
from kervan.bench.refusals import is_hopeless
from kervan.bench.served_by import ServedBy, from_headers, from_status
from kervan.config.workload import parse_lengths
from kervan.direct_http import NO_RESPONSE, open_direct, parse_url
from kervan.errors import ConfigError, FleetError
from kervan.facts.markup import json_value
from kervan.vendor import vllm_names

DEFAULT_VOCAB = 1000  # every language model has as many tokens
CONTROL_TIMEOUT_S = 15.0
PROBE_TIMEOUT_S = 60.0
NUM_WORDS = 256
SHOWN_MODELS = 8
STATUS_PATH = "/kervan/status"


class RequestError(Exception):
    """A control request that gave no JSON; the message says why. `unreached`: no connection, and what to do."""

    def __init__(self, message: str, unreached: str = "") -> None:
        super().__init__(message)
        self.unreached = unreached


@dataclass(frozen=True, slots=True)
class Probe:
    """What a server said of itself. `model_root`: where it has the model from; `answered`: a first request worked.

    `error`: the kind of failure of that request. `unreached`: why there is no connection at all, and what to do.
    """

    models: tuple[str, ...] = ()
    model_root: str = ""
    max_model_len: int | None = None
    version: str = ""
    answered: bool = False
    complaint: str = ""
    error: str = ""
    unreached: str = ""
    served_by: ServedBy = ServedBy()  # noqa: RUF009 - frozen

    def failed(self, exchange: Exchange) -> "Probe":
        """The same after a first request that failed."""
        assert exchange.error is not None
        return replace(self, error=exchange.error, complaint=f"{exchange.error}: {exchange.message}")


def _open(endpoint: Endpoint, path: str, body: bytes | None = None, timeout_s: float = CONTROL_TIMEOUT_S) -> Any:
    headers = dict(endpoint.headers) | ({"Content-Type": "application/json"} if body is not None else {})
    request = urllib.request.Request(endpoint.url + path, data=body, headers=headers)
    return open_direct(request, timeout_s=timeout_s, verify_tls=endpoint.verify_tls)


def get_text(endpoint: Endpoint, path: str) -> str:
    """The body of the response to a GET, at most 64 MiB of it; bytes that are not UTF-8 are replaced.

    Raises: RequestError when there is no response, or one with an error status.
    """
    return _get(endpoint, path)[0]


def _get(endpoint: Endpoint, path: str) -> tuple[str, dict[str, str]]:
    """The body and the headers, with names in small letters."""
    try:
        with _open(endpoint, path) as response:
            headers = {name.lower(): value for name, value in response.headers.items()}
            return str(response.read(64 * 2**20).decode(errors="replace")), headers
    except NO_RESPONSE as error:
        raise _request_error(f"GET {path}", error) from error


def _request_error(what: str, error: Exception) -> RequestError:
    if isinstance(error, urllib.error.HTTPError):
        error.close()  # it holds the response
    return RequestError(f"{what}: {_why(error)}", _unreached(error))


def _unreached(error: Exception) -> str:
    """Why there is no connection, and what to do; empty when there was one."""
    if not isinstance(error, urllib.error.URLError) or isinstance(error, urllib.error.HTTPError):
        return ""
    reason = error.reason
    if isinstance(reason, ssl.SSLCertVerificationError):
        return (
            f"its certificate is not valid here: {reason.verify_message}; name the file of the CA that issued it in "
            "SSL_CERT_FILE, or accept it with --insecure"
        )
    if isinstance(reason, ssl.SSLError):
        return f"it speaks no TLS there ({reason.reason}); use http:// in place of https://"
    why = reason.strerror if isinstance(reason, OSError) and reason.strerror else str(reason)
    return f"{why[:1].lower()}{why[1:]}; start the server, or check host and port"


def call(endpoint: Endpoint, path: str, body: Any) -> Any:
    """The JSON response to a POST.

    Raises: RequestError when there is no response, or one with an error status, or one that is not JSON.
    """
    try:
        with _open(endpoint, path, encode(body)) as response:
            return json.loads(response.read())
    except NO_RESPONSE as error:
        raise _request_error(f"POST {path}", error) from error


def stream_once(endpoint: Endpoint, body: dict[str, Any], timeout_s: float = PROBE_TIMEOUT_S) -> Exchange:
    """One streamed request, simply; never raises for what the server does."""
    exchange = Exchange(0, time.time(), Request(b""))
    full = {"model": endpoint.model, "stream": True, "stream_options": {"include_usage": True}, **body}
    fault: str | None = None
    try:
        with _open(endpoint, PATHS[endpoint.api], encode(full | endpoint.sampling), timeout_s) as response:
            exchange.on_status(response.status, {k.lower(): v for k, v in response.headers.items()})
            while piece := response.read1(65536):
                exchange.on_body(piece, time.time())
    except urllib.error.HTTPError as error:
        exchange.on_status(error.code, {k.lower(): v for k, v in error.headers.items()})
        with error, suppress(*NO_RESPONSE):
            exchange.on_body(error.read(2000), time.time())
    except NO_RESPONSE as error:
        fault = _why(error)
    exchange.on_end(time.time(), fault)
    return exchange


def _why(error: Exception) -> str:
    """In one line; what a server says that speaks no HTTP may have more, or bytes that are no text."""
    said = " ".join(str(error).split())[:200]
    return f"no HTTP ({said!r})" if isinstance(error, http.client.HTTPException) else said or type(error).__name__


def first_look(endpoint: Endpoint) -> tuple[Endpoint, Probe]:
    """The endpoint with its model's name, and what the server says of itself; a silent server gives an empty probe.

    Raises: ConfigError for a URL that is none; when the server has several models, and none of them was asked for.
    """
    endpoint = replace(endpoint, url=parse_url(endpoint.url))
    try:
        text, headers = _get(endpoint, vllm_names.MODELS_PATH)
    except RequestError as error:
        return endpoint, Probe(complaint=str(error), unreached=error.unreached)
    try:
        entries = json_value(text)["data"]
        models = tuple(str(entry["id"]) for entry in entries)
        owner = str(entries[0].get("owned_by") or "") if entries else ""
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        complaint = f"GET {vllm_names.MODELS_PATH}: no list of models: {error!r}"
        return endpoint, Probe(complaint=complaint, served_by=from_headers(headers, "", ""))
    model = endpoint.model
    if not model and len(models) != 1:
        roots = [name for name, entry in zip(models, entries, strict=True) if not entry.get("parent")]
        if len(roots) != 1:
            raise ConfigError(
                f"{endpoint.url} serves {len(models)} models: {', '.join(models[:8])}; choose with --model"
            )
        model = roots[0]
    model = model or models[0]
    entry: dict[str, Any] = next((entry for entry in entries if entry["id"] == model), {})
    try:
        version = str(json.loads(get_text(endpoint, "/version"))["version"])
    except (RequestError, ValueError, KeyError, TypeError):
        version = ""
    try:
        status = json.loads(get_text(endpoint, STATUS_PATH))
    except (RequestError, ValueError):
        status = None
    probe = Probe(
        models, str(entry.get("root") or ""), entry.get("max_model_len"), version,
        served_by=from_status(status, model, version) or from_headers(headers, owner, version),
    )  # fmt: skip
    return replace(endpoint, model=model), probe


def find_alphabet(endpoint: Endpoint, load: Load, probe: Probe, tokenizer: str | None) -> tuple[Alphabet, Probe]:
    """What prompts for this server are made of, checked with one to three small requests.

    A server that does not answer gets token ids, so that a run can count how it fails.

    Raises: ConfigError when exact lengths are impossible: texts are needed and no tokenizer is known.
    """
    exchange: Exchange | None = None
    if probe.models and endpoint.model not in probe.models:  # some servers have names that they do not list
        exchange = stream_once(endpoint, {**_content(endpoint, "a"), "max_tokens": 1})
        if exchange.error is not None and is_hopeless(exchange.error):
            return Alphabet(words=(" a",)), probe.failed(exchange)
    if load.prompts:
        rows = read_prompts(Path(load.prompts))
        check_api(rows, endpoint.api)
        return Alphabet(vocab_size=DEFAULT_VOCAB), replace(probe, answered=True)
    if endpoint.api == "completions" and tokenizer is None:
        vocab = _vocab_size(probe.model_root) or DEFAULT_VOCAB
        first = min(10, vocab - 1)
        exchange = stream_once(endpoint, {"prompt": [first] * 16, "max_tokens": 1})
        if exchange.error is None:
            counted = exchange.prompt_tokens
            complaint = "" if counted in (None, 16) else f"for 16 token ids the server counted {counted} prompt tokens"
            return Alphabet(vocab_size=vocab), replace(probe, answered=True, complaint=complaint)
        if exchange.error not in ("http_400", "http_422"):
            return Alphabet(vocab_size=vocab), probe.failed(exchange)
    words = _local_words(tokenizer) if tokenizer else _served_words(endpoint, probe)
    if not words:
        if probe.complaint and endpoint.api == "chat":  # nothing answers: any text will do to count the failures
            exchange = stream_once(endpoint, {**_content(endpoint, " a"), "max_tokens": 1})
            return Alphabet(words=(" a",)), probe if exchange.error is None else probe.failed(exchange)
        why = f" ({' '.join(exchange.message.split())})" if exchange is not None else ""
        raise ConfigError(
            f"{endpoint.url} takes no token ids here{why} and has no /tokenize; give --tokenizer DIR, so that prompts "
            "have exact lengths"
        )
    counts = []
    for number in (48, 96):
        text = "".join(random.Random(number).choices(words, k=number))
        exchange = stream_once(endpoint, {**_content(endpoint, text), "max_tokens": 1})
        if exchange.error is not None:
            return Alphabet(words=words), probe.failed(exchange)
        if exchange.prompt_tokens is None:
            return Alphabet(words=words), replace(probe, answered=True, complaint="no usage: prompt lengths unchecked")
        counts.append(exchange.prompt_tokens - number)
    if counts[0] != counts[1]:
        raise ConfigError(
            f"{tokenizer or endpoint.url}: 48 words made {48 + counts[0]} tokens and 96 made {96 + counts[1]}, so this "
            "is not the server's tokenizer; give --tokenizer the model's directory"
        )
    return Alphabet(words=words, extra_tokens=counts[0]), replace(probe, answered=True)


def _content(endpoint: Endpoint, text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]} if endpoint.api == "chat" else {"prompt": text}


def check_can_succeed(endpoint: Endpoint, load: Load, probe: Probe) -> None:
    """Raises: FleetError or ConfigError, with the fix, when no request of the load to this server can succeed."""
    if probe.unreached:
        raise FleetError(f"{endpoint.url} does not answer: {probe.unreached}")
    path, kind, failure = PATHS[endpoint.api], probe.error, " ".join(probe.complaint.split())
    if kind in ("http_401", "http_403"):
        raise ConfigError(f"{endpoint.url} does not let this client in ({failure}); give its key with --api-key KEY")
    if kind and is_hopeless(kind) and probe.models and endpoint.model not in probe.models:
        near = difflib.get_close_matches(endpoint.model, probe.models, n=1, cutoff=0.0)[0]
        others = f" and {len(probe.models) - SHOWN_MODELS} more" if len(probe.models) > SHOWN_MODELS else ""
        raise ConfigError(
            f"{endpoint.url} has no model {endpoint.model!r}; it has {', '.join(probe.models[:SHOWN_MODELS])}{others}: "
            f"use for example --model {near}"
        )
    if kind.startswith("http_3"):
        raise ConfigError(f"{endpoint.url} redirects POST {path} ({failure}); give the URL that it points to")
    if kind in ("http_404", "http_405"):
        other = next(api for api in PATHS if api != endpoint.api)
        raise ConfigError(
            f"{endpoint.url} has no POST {path} for this ({failure}); check --model and the URL, or use --api {other}"
        )
    # 400 and 422 may be about the small request alone.
    if kind and is_hopeless(kind) and kind not in ("http_400", "http_422"):
        raise ConfigError(
            f"{endpoint.url} gives no stream at {path} ({failure}); give the URL of an OpenAI-compatible server"
        )
    if load.prompts is None and load.trace is None and probe.max_model_len and "max_tokens" not in endpoint.sampling:
        isl, osl = parse_lengths(load.isl), parse_lengths(load.osl)
        least = load.prefix_tokens + load.turns * (isl.minimum + osl.minimum)
        if least > probe.max_model_len:
            prefix = f", --prefix {load.prefixes}x{load.prefix_tokens}" if load.prefixes else ""
            turns = f" in {load.turns} turns" if load.turns > 1 else ""
            raise ConfigError(
                f"--isl {load.isl}{prefix} and --osl {load.osl} make {least} tokens or more{turns}, and the server's "
                f"max_model_len is {probe.max_model_len}; use shorter ones" + (" or fewer turns" if turns else "")
            )


def _vocab_size(model_root: str) -> int | None:
    """From the model's config, when the server runs on this machine from a local directory."""
    try:
        config = json.loads((Path(model_root) / "config.json").read_text())
        return int(config.get("vocab_size") or config["text_config"]["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _local_words(tokenizer: str) -> tuple[str, ...]:
    """Single-token words of a tokenizer: a directory with tokenizer.json, that file, or a Hugging Face id."""
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise ConfigError("--tokenizer needs the package tokenizers: pip install 'kervan[bench]'") from error
    path = Path(tokenizer)
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        loaded = Tokenizer.from_file(str(file)) if file.is_file() else Tokenizer.from_pretrained(tokenizer)
    except Exception as error:  # the Rust side raises plain Exception
        raise ConfigError(
            f"tokenizer {tokenizer!r}: {str(error).splitlines()[0][:200]}; give a directory with tokenizer.json"
        ) from error
    ids = random.Random(0).sample(range(loaded.get_vocab_size()), loaded.get_vocab_size())

    def encode_text(text: str) -> list[int]:
        return list(loaded.encode(text, add_special_tokens=False).ids)

    return _words((_as_text(loaded.id_to_token(i)) for i in ids), encode_text)


def _as_text(token: str | None) -> str:
    """Byte-level and SentencePiece tokens mark the space before a word with a letter of their own."""
    return (token or "").replace("\u0120", " ").replace("\u2581", " ")


def _words(candidates: Iterable[str], encode_text: Callable[[str], Sequence[int]]) -> tuple[str, ...]:
    """The first words that stay one token each when joined."""
    words = []
    for word in candidates:
        if len(word) > 2 and word[0] == " " and word[1:].isascii() and word[1:].isalpha() and word[1:].islower():
            words.append(word)
        if len(words) == 4 * NUM_WORDS:
            break
    kept = [word for word in words if len(encode_text(word * 3)) == 3][:NUM_WORDS]
    while kept and len(encode_text("".join(kept))) != len(kept):
        kept = kept[: len(kept) // 2]  # rare merges over a word's end
    return tuple(kept)


def _served_words(endpoint: Endpoint, probe: Probe) -> tuple[str, ...]:
    """The same by the server's own /tokenize and /detokenize (vLLM has them), or its model's local files."""
    if probe.model_root and (Path(probe.model_root) / "tokenizer.json").is_file():
        words = _local_words(probe.model_root)
        if words:
            return words

    def encode_text(text: str) -> Sequence[int]:
        body = {"model": endpoint.model, "prompt": text, "add_special_tokens": False}
        tokens: Sequence[int] = call(endpoint, vllm_names.TOKENIZE_PATH, body)["tokens"]
        return tokens

    try:
        texts: list[str] = []
        for number in range(DEFAULT_VOCAB):
            if len(texts) >= NUM_WORDS // 2:
                break
            token = call(endpoint, "/detokenize", {"model": endpoint.model, "tokens": [300 + number]})["prompt"]
            word = token if token.startswith(" ") else f" {token}"
            if word[1:].isascii() and word[1:].isalpha() and word[1:].islower() and len(word) > 2:
                texts.append(word)
        return _words(texts, encode_text)
    except (RequestError, KeyError, TypeError):
        return ()
