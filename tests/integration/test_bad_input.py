"""Requests that no client should send. Each is answered with 4xx and an OpenAI-style body, or served where vLLM takes it.

Never 5xx, never silence, and never at the cost of a replica: all pids are the same at the end.
"""

import json
import random
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from harness.live import REQUEST_S, Fleet

from kervan.demo import PAIRS

QUESTION, ANSWER = next(iter(PAIRS.items()))
HUGE = 2**70
# JSON has no word for these; they are written as Python and JavaScript clients write them, or as a number too large.
NAN, INFINITY = float("nan"), float("inf")
ENDPOINTS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hello"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hello"}]},
}

# vLLM must refuse these, on both endpoints, streamed or not.
REFUSED: dict[str, list[Any]] = {
    "model": [1, [], "no-such-model"],
    "max_tokens": [-1, 2**31, HUGE, 1.5, "x", [], {}, INFINITY],
    "n": [0, -1, 129, 10**6, HUGE, "x"],
    "temperature": [-1, NAN, INFINITY, -INFINITY, "x", []],
    "top_p": [-1, 0, 2, NAN, INFINITY, "x"],
    "top_k": [-5, 2**31, 2**40, HUGE, 1.5, "x"],
    "min_p": [-1, 2, "x"],
    "seed": [2**63, HUGE, -HUGE, 1.5, "x"],
    "prompt_logprobs": [10**9, -5, HUGE, "x"],
    "presence_penalty": [10**9, -3, "x"],
    "frequency_penalty": [10**9, "x"],
    "repetition_penalty": [0, -1, "x"],
    "logit_bias": [[1], "x", {"x": 1}, {"5": "x"}, {"-1": 1}, {"99999": 1}, {str(HUGE): 1}, {str(2**31): 1}],
    "stop": [1, [1], {"a": 1}, [""]],
    "stop_token_ids": ["x", ["x"], [-1], [99999], [2**31], [HUGE]],
    "allowed_token_ids": [[], "x", ["x"], [-1], [99999], [2**31], [HUGE]],
    "bad_words": ["x", [1], [""]],
    "min_tokens": [-1, 10**9, HUGE, "x"],
    "stream_options": ["x", 1],
    "response_format": [
        "x",
        {"type": "x"},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "no-such"}}},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "#/nowhere"}}},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "#"}}},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "string", "pattern": "((("}}},
    ],
    "structured_outputs": [
        "x",
        [],
        {"json": "x"},
        {"json": {"enum": []}},
        {"json": {"type": "array", "minItems": 10**9}},
        {"json": {"type": "array", "maxItems": 1e9}},
        {"json": {"type": "object", "properties": {"a": {"type": "string", "maxLength": 10**8}}}},
        {"regex": "[a-z]{0,99999}"},
        {"regex": "(a{1,1000}){1,1000}"},
        {"grammar": 'root ::= "a"{0,100000}'},
        {"json": {"type": "string", "minLength": 9, "maxLength": 1}},
        {"json": {"enum": ["x" * 6000 + str(i) for i in range(10)]}},
        {"json": {"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(5000)}}},
        {"regex": "((("},
        {"regex": r"\1"},
        {"regex": "(?=a)b"},
        {"regex": "(" * 900 + "a{0,99}" + "){0,99}" * 900},
        {"regex": "x" * 100_000},
        {"choice": []},
        {"choice": [1]},
        {"choice": ["x" * 10_000]},
        {"grammar": "x"},
        {"grammar": ""},
        {"grammar": "root ::= root"},
        {"grammar": "root ::= " + "(" * 5000},
        {"structural_tag": "{}"},
        {"json": {}, "regex": "a"},
    ],
    "priority": [HUGE, "x"],
    "truncate_prompt_tokens": [-5, HUGE, "x"],
    "vllm_xargs": ["x"],
    "kv_transfer_params": ["x"],
}

# Both answers are right: it depends on vLLM's version or endpoint. Only 5xx and silence are wrong.
DISPUTED: dict[str, list[Any]] = {
    "max_tokens": [0, True],
    "temperature": [1e-300, 1e300, HUGE],
    "top_k": [0, 2**31 - 1],
    "logprobs": [10**9, -5, HUGE, "x"],
    "top_logprobs": [10**9, -5, HUGE, "x"],
    "prompt_logprobs": [1, -1],
    "presence_penalty": [NAN],
    "repetition_penalty": [NAN, INFINITY, 1e300],
    "min_p": [NAN],
    "logit_bias": [{str(i): 1 for i in range(1100)}, {"5": NAN}, {"5": INFINITY}, {"5": 10**9}],
    "stop": [["a"] * 10_000, "a" * 100_000],
    "stop_token_ids": [list(range(1100))],
    "allowed_token_ids": [list(range(1100)) * 2],
    "bad_words": [["a"] * 2000, ["a " * 5000], [" "]],
    "echo": [True, "x"],
    "ignore_eos": ["x"],
    "structured_outputs": [
        {},
        {"json": {}},
        {"regex": ""},
        {"regex": r"\p{L}+"},
        {"regex": "((a+)+)+b"},
        {"regex": "(a|aa)+" * 1000},
        {"json": {"type": "number", "multipleOf": 5}},
        {"json": {"type": "array", "minItems": 3}},
        {"json": {"type": "integer", "minimum": 10**30}},
        {"json": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}},
    ],
    "unknown_field": ["x"],
    "priority": [5],
    "cache_salt": ["", "a" * 100_000],
    "request_id": ["a" * 100_000],
    "repetition_detection": [{"max_pattern_size": 2**40, "min_pattern_size": 0, "min_count": 0}],
    "prompt_embeds": ["AAAA"],
}

PROMPTS: list[Any] = [
    *(None, 1, {}, [], [[]], [1, HUGE], [-1], [2**31], [99999], ["a", 1], [[1], ["a"]], [1.5], [[99999]]),
    *("a " * 5000, [1] * 5000),
]
MESSAGES: list[Any] = [
    *(None, 1, {}, "x", [1], [{}]),
    [{"role": "user", "content": 1}],
    [{"role": "user", "content": "a " * 5000}],
    [{"role": "user", "content": [{"type": "nope", "x": 1}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}]}],
    [{"role": "assistant", "tool_calls": "x"}],
]
CHAT_ONLY: dict[str, list[Any]] = {
    "messages": MESSAGES,
    "tools": ["x", [1], [{}], [{"type": "function"}]],
    "tool_choice": ["x", 1, {"type": "function", "function": {"name": "nope"}}],
    "chat_template_kwargs": ["x"],
    "chat_template": ["{% for"],
}


@pytest.fixture(scope="module")
def slow(fleet: Fleet) -> Iterator[socket.socket]:
    """A request whose body never ends; the gateway waits for it for 30 s, and serves others meanwhile."""
    with socket.create_connection(("127.0.0.1", fleet.port), timeout=REQUEST_S) as slow:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n"
        slow.sendall(head + b'{"model"')
        yield slow


@pytest.fixture(scope="module")
def same_replicas(fleet: Fleet, slow: socket.socket) -> Iterator[None]:
    """All of this leaves every process alive and the fleet in its right mind."""
    before = (fleet.pids(), fleet.gateway_pids())
    yield
    body = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 200}
    with fleet.client() as client:
        for _ in range(4):
            assert client.post("/chat", json=body).json()["content"] == ANSWER
    assert (fleet.pids(), fleet.gateway_pids()) == before


pytestmark = pytest.mark.usefixtures("same_replicas")


@pytest.fixture(scope="module")
def client(fleet: Fleet) -> Iterator[httpx.Client]:
    with fleet.client() as client:
        yield client


def send(client: httpx.Client, path: str, body: Any) -> httpx.Response:
    """POST as JSON; infinities as a number too large for a double."""
    text = json.dumps(body).replace("Infinity", "1e400")
    return client.post(path, content=text, headers={"content-type": "application/json"})


def refusal(response: httpx.Response) -> str | None:
    """Its message, None where the request was served; AssertionError for anything else than these two."""
    if response.status_code != 200:
        assert 400 <= response.status_code < 500, f"{response.status_code}: {response.text[:500]}"
        message: str = response.json()["error"]["message"]
        assert message
        return message
    if "text/event-stream" in response.headers["content-type"]:
        # vLLM finds some faults after it has begun to answer; it tells them in the stream.
        events = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
        assert events[-1] == "[DONE]", response.text[-500:]
        for event in map(json.loads, events[:-1]):
            if "error" in event:
                assert 400 <= event["error"]["code"] < 500, event
                return str(event["error"]["message"])
    return None


def variants(path: str, name: str, value: Any) -> Iterator[dict[str, Any]]:
    for stream in (False, True):
        body = {"model": "tiny", "max_tokens": 4, "temperature": 0, "stream": stream, **ENDPOINTS[path]}
        if name == "top_logprobs":
            body["logprobs"] = True
        if name == "tool_choice":
            body["tools"] = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
        yield {**body, name: value}


def outcomes(client: httpx.Client, path: str, name: str, values: list[Any]) -> list[tuple[str, str | None]]:
    """(what was sent, why it was refused) for all values, streamed and not."""
    bodies = [body for value in values for body in variants(path, name, value)]
    with ThreadPoolExecutor(4) as pool:
        responses = list(pool.map(lambda body: send(client, path, body), bodies))
    return [
        (f"{name}={json.dumps(body[name])[:100]}, stream={body['stream']}", refusal(response))
        for body, response in zip(bodies, responses, strict=True)
    ]


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize("name", REFUSED)
def test_refused(client: httpx.Client, path: str, name: str) -> None:
    assert [sent for sent, why in outcomes(client, path, name, REFUSED[name]) if why is None] == []


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize("name", DISPUTED)
def test_refused_or_served(client: httpx.Client, path: str, name: str) -> None:
    outcomes(client, path, name, DISPUTED[name])


@pytest.mark.parametrize(
    ("name", "value"), [("stop_token_ids", [250, 251] * 150), ("allowed_token_ids", list(range(200)) * 6)]
)
@pytest.mark.parametrize("path", ENDPOINTS)
def test_model_runner_v1_takes_more_token_ids_than_v2(client: httpx.Client, path: str, name: str, value: Any) -> None:
    assert [why for _, why in outcomes(client, path, name, [value])] == [None, None]


def test_prompts(client: httpx.Client) -> None:
    assert [sent for sent, why in outcomes(client, "/v1/completions", "prompt", PROMPTS) if why is None] == []


@pytest.mark.parametrize("name", CHAT_ONLY)
def test_chat_fields(client: httpx.Client, name: str) -> None:
    found = outcomes(client, "/v1/chat/completions", name, CHAT_ONLY[name])
    assert [sent for sent, why in found if why is None] == []


def test_prompt_longer_than_the_context(client: httpx.Client) -> None:
    for path, name, value in (
        ("/v1/completions", "prompt", "a " * 3000),
        ("/v1/chat/completions", "messages", [{"role": "user", "content": "a " * 3000}]),
    ):
        for sent, why in outcomes(client, path, name, [value]):
            assert why is not None, sent
            assert "2048" in why


@pytest.mark.parametrize("path", [*ENDPOINTS, "/v1/responses", "/tokenize", "/detokenize", "/generate", "/chat"])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"model": "tiny", ',
        b"[]",
        b"null",
        b"1",
        b'"x"',
        b"[" * 100_000,
        b'{"model":' * 50_000,
        b'{"prompt": "\xff\xfe", "messages": [{"role": "user", "content": "\xff"}]}',
        b'{"prompt": "\\ud800", "messages": [{"role": "user", "content": "\\ud800"}], "max_tokens": "x"}',
        b"\x00\x01\x02",
        b'{"a": 1e99999, "prompt": {}, "messages": {}}',
    ],
    ids=lambda body: repr(body[:20]),
)
def test_malformed_bodies(client: httpx.Client, path: str, body: bytes) -> None:
    response = client.post(path, content=body, headers={"content-type": "application/json"})
    assert refusal(response) is not None


@pytest.mark.parametrize(
    ("path", "bodies"),
    [
        ("/v1/responses", [{"input": 1}, {"input": "x", "max_output_tokens": -1}, {"input": "x", "temperature": "x"}]),
        ("/tokenize", [{"prompt": 1}, {}, {"messages": 1}]),
        ("/detokenize", [{"tokens": ["x"]}, {"tokens": [HUGE]}, {"tokens": [-1]}, {}]),
        ("/generate", [{}, {"prompt": 1}, {"prompt": "x", "max_tokens": 0}, {"prompt": "x", "no": 1}]),
        ("/chat", [{}, {"messages": []}, {"messages": [1]}, {"messages": [{"role": "user"}], "max_tokens": HUGE}]),
    ],
)
def test_other_endpoints(client: httpx.Client, path: str, bodies: list[dict[str, Any]]) -> None:
    for body in bodies:
        named = body if path in ("/generate", "/chat") else {"model": "tiny", **body}
        assert refusal(send(client, path, named)) is not None, body


def test_unknown_path_and_method(client: httpx.Client) -> None:
    assert client.get("/no/such/path").status_code == 404
    assert client.get("/v1/chat/completions").status_code == 405


def test_ten_megabytes(fleet: Fleet) -> None:
    body = {"model": "tiny", "prompt": "x" * 10_000_000}
    with fleet.client() as client:
        response = client.post("/v1/completions", json=body)
    assert response.status_code == 413
    assert "8388608" in response.json()["error"]["message"]


def test_slow_body(fleet: Fleet, slow: socket.socket) -> None:
    """A body that never ends is given up by the gateway; others are served meanwhile."""
    with fleet.client() as client:
        body = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 200}
        assert client.post("/chat", json=body).json()["content"] == ANSWER
    answer = b""
    deadline_s = time.monotonic() + REQUEST_S
    while chunk := slow.recv(65536):
        answer += chunk
        assert time.monotonic() < deadline_s
    assert answer.startswith(b"HTTP/1.1 408")
    assert b'"error"' in answer


def fuzz(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """An endpoint, and a request for it with one to three fields that were not meant to be."""
    path = rng.choice(list(ENDPOINTS))
    body: dict[str, Any] = {"model": "tiny", "max_tokens": 4, "stream": rng.random() < 0.5, **ENDPOINTS[path]}
    numbers = [0, -1, 1, 2, 0.5, -0.0, 1e-9, 1e30, 2**31, 2**31 - 1, 2**32, -(2**31), 2**63, 2**64, HUGE, NAN, INFINITY]
    leaves = [*numbers, "", "x", "\u0000", "\U0001f42b" * 50, None, True, False, [], {}]

    def value(depth: int = 0) -> Any:
        kind = rng.random()
        if depth < 3 and kind < 0.15:
            return [value(depth + 1) for _ in range(rng.randrange(4))]
        if depth < 3 and kind < 0.3:
            return {rng.choice(["type", "a", "5", "json", "regex", "name"]): value(depth + 1) for _ in range(2)}
        return rng.choice(leaves)

    fields = [
        *REFUSED,
        *DISPUTED,
        "stream",
        "user",
        "suffix",
        "best_of",
        "length_penalty",
        "include_stop_str_in_output",
    ]
    fields += ["tools", "messages", "prompt", "return_token_ids", "spaces_between_special_tokens", "top_logprobs"]
    for name in rng.sample(fields, rng.randint(1, 3)):
        body[name] = value()
    if body.get("max_tokens") is None:
        body["max_tokens"] = 4  # until the end of the context is a fair request, but a long one
    return path, body


@pytest.mark.parametrize("seed", range(4))
def test_fuzz(client: httpx.Client, seed: int) -> None:
    rng = random.Random(seed)
    requests = [fuzz(rng) for _ in range(100)]

    def attempt(request: tuple[str, dict[str, Any]]) -> httpx.Response:
        return send(client, *request)

    with ThreadPoolExecutor(4) as pool:
        for request, response in zip(requests, pool.map(attempt, requests), strict=True):
            try:
                refusal(response)
            except AssertionError as error:
                raise AssertionError(f"seed {seed}: {json.dumps(request)}") from error
