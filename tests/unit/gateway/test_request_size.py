import json
from typing import Any

import pytest

from kervan.gateway import request_size

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.mark.parametrize(
    ("path", "body", "num_streams"),
    [
        (COMPLETIONS, {"prompt": "a"}, 1),
        (COMPLETIONS, {"prompt": ["a"] * 100, "n": 100}, 10_000),
        (COMPLETIONS, {"prompt": [1, 2, 3], "n": 4}, 4),
        (COMPLETIONS, {"prompt": [[1, 2], [3]], "n": 4}, 8),
        (COMPLETIONS, {"prompt": [], "n": 4}, 4),
        (COMPLETIONS, {"prompt": None, "prompt_embeds": ["QQ==", "QQ=="]}, 2),
        (COMPLETIONS, {"prompt": ["a"], "prompt_embeds": "QQ=="}, 2),
        (COMPLETIONS, {"prompt": ["a", "b"], "n": 64, "use_beam_search": True}, 128),
        (COMPLETIONS, {"prompt": ["a"], "n": 2, "best_of": 500}, 2),
        (COMPLETIONS, {"prompt": ["a", "b"], "n": "3"}, 6),
        (COMPLETIONS, {"prompt": ["a", "b"], "n": 3.0}, 6),
        (COMPLETIONS, {"prompt": ["a", "b"], "n": None}, 2),
        (COMPLETIONS, {"prompt": ["a", "b"], "n": -5}, 2),
        (COMPLETIONS, {"prompt": ["a", "b"], "n": [1]}, 2),
        (COMPLETIONS, {"prompt": "a", "n": 10**30}, 2**63 - 1),
        (CHAT, {"messages": [{"role": "user"}] * 9}, 1),
        (CHAT, {"messages": [], "n": 128}, 128),
        (CHAT + "/batch", {"messages": [[{"role": "user"}]] * 9}, 9),
        ("/inference/v1/generate", {"token_ids": [1, 2], "sampling_params": {"n": 40}}, 40),
        ("/inference/v1/generate", {"token_ids": [1, 2], "sampling_params": 5}, 1),
        ("/v1/systemone", {"questions": {"a": {}, "b": {}}}, 2),
        ("/v1/systemone", {"questions": 5}, 1),
        ("/v1/embeddings", {"input": "a"}, 1),
        ("/v1/embeddings", {"input": ["a"] * 50}, 50),
        ("/v1/embeddings", {"input": [1, 2, 3]}, 1),
        ("/v1/embeddings", {"input": [[1], [2]]}, 2),
        ("/v1/embeddings", {"input": [{"role": "user"}, {"role": "user"}]}, 1),
        ("/v1/embeddings", {"messages": [[{"role": "user"}]] * 3}, 3),
        ("/v2/embed", {"texts": ["a", "b"]}, 2),
        ("/v2/embed", {"inputs": [{"content": []}] * 4}, 4),
        ("/pooling", {"input": ["a", "b"]}, 2),
        ("/classify", {"input": ["a", "b"]}, 2),
        ("/score", {"text_1": "a", "text_2": "b"}, 1),
        ("/v1/score", {"queries": "a", "documents": ["b"] * 20}, 21),
        ("/v1/score", {"data_1": ["a"] * 20, "data_2": [{"content": []}] * 20}, 40),
        ("/v2/rerank", {"query": "a", "documents": ["b"] * 20}, 21),
        ("/generative_scoring", {"query": "a", "items": ["b"] * 20}, 21),
        ("/invocations", {"prompt": ["a"] * 5, "n": 5}, 25),
        ("/invocations", {"input": ["a"] * 5}, 5),
        ("/invocations", {"messages": [{"role": "user"}], "n": 5}, 5),
        ("/v1/responses", {"input": ["a"] * 5}, 1),
        ("/v1/messages", {"messages": [{"role": "user"}] * 5}, 1),
        ("/generate", {"prompt": "a"}, 1),
    ],
)
def test_streams(path: str, body: dict[str, Any], num_streams: int) -> None:
    assert request_size.read(path, json.dumps(body).encode()).num_streams == num_streams
    # What vLLM's JSON parser takes beyond the standard hides nothing.
    assert (
        request_size.read(path, json.dumps(body | {"top_p": float("nan")}).encode("utf-16")).num_streams == num_streams
    )


@pytest.mark.parametrize(
    ("body", "num_streams"),
    [
        (b'{"n": 2, "\\u006e": 7}', 7),
        (b'{"n": 7, "x": 1e999}', 7),
        (b'{"n": 1e999}', 2**63 - 1),
        (b'{"prompt": [\n "a",\t"b"]}', 2),
        (b"", 1),
        (b"[1, 2]", 1),
        (b'{"n": 5', 1),
        (b'{"x": ' + b"[" * 100_000, 1),
    ],
)
def test_odd_bodies(body: bytes, num_streams: int) -> None:
    assert request_size.read(COMPLETIONS, body).num_streams == num_streams


@pytest.mark.parametrize(("beams", "num_streams"), [(b"true", 50), (b"false", 1)])
def test_beams_of_a_form(beams: bytes, num_streams: int) -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="'
    body = head + b'n"\r\n\r\n50\r\n' + head + b'use_beam_search"\r\n\r\n' + beams + b"\r\n--x--\r\n"
    assert request_size.read("/v1/audio/transcriptions", body).num_streams == num_streams


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"prompt": ["a"] * 100, "n": 100}, "100 prompts x n=100 = 10,000 streams"),
        ({"prompt": "a", "n": 100}, "1 prompt x n=100 = 100 streams"),
        ({"prompt": ["a"] * 100}, "100 prompts = 100 streams"),
    ],
)
def test_the_arithmetic(body: dict[str, Any], text: str) -> None:
    assert str(request_size.read(COMPLETIONS, json.dumps(body).encode())) == text
