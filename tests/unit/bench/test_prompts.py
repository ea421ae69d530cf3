"""Prompts have the asked length, the same for the same seed, and shared beginnings where asked."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from kervan.bench.endpoint import _local_words
from kervan.bench.load import Endpoint, Load
from kervan.bench.prompts import Alphabet, Prompts, check_api, http_request, read_prompts
from kervan.config.workload import TraceRow
from kervan.direct_http import parse_url
from kervan.errors import ConfigError

IDS = Alphabet(vocab_size=500)
WORDS = Alphabet(words=(" ab", " cd", " ef"), extra_tokens=7)
TARGET = Endpoint(url="http://x", model="m")
CHAT = Endpoint(url="http://x", model="m", api="chat")


def bodies(load: Load, target: Endpoint = TARGET, alphabet: Alphabet = IDS, count: int = 4) -> list[dict[str, Any]]:
    prompts = Prompts(load, target, alphabet)
    return [json.loads(prompts.request(i, 0, None, ()).body) for i in range(count)]


def load(**more: Any) -> Load:
    return Load(**{"streams": 1, "num_requests": 4, **more})


def test_ids() -> None:
    first = bodies(load(isl="33", osl="9", seed=3))
    assert [len(body["prompt"]) for body in first] == [33] * 4
    assert all(10 <= i < 500 for body in first for i in body["prompt"])
    assert first == bodies(load(isl="33", osl="9", seed=3)) != bodies(load(isl="33", osl="9", seed=4))
    assert first[0] | {"prompt": 0} == {
        "model": "m", "prompt": 0, "max_tokens": 9, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip


def test_shared_prefixes_come_on_top() -> None:
    found = bodies(load(isl="10", prefixes=2, prefix_tokens=40), count=40)
    assert {len(body["prompt"]) for body in found} == {50}
    assert len({tuple(body["prompt"][:40]) for body in found}) == 2
    assert len({tuple(body["prompt"][40:]) for body in found}) == 40


def test_chat_counts_the_template() -> None:
    (body,) = bodies(load(isl="12"), CHAT, WORDS, 1)
    assert body["messages"][0]["content"].count(" ") == 12 - 7
    with pytest.raises(ConfigError, match=r"--isl 7: the server adds 7 .* --isl 8"):
        bodies(load(isl="7"), CHAT, WORDS)


def test_trace_rows_share_their_blocks() -> None:
    prompts = Prompts(load(), TARGET, IDS)
    rows = [TraceRow(0, 600, 5, (1, 2)), TraceRow(1, 1000, 7, (1, 3)), TraceRow(2, 20, 0)]
    asks = [prompts.request(i, 0, row, ()) for i, row in enumerate(rows)]
    a, b, c = (json.loads(ask.body) for ask in asks)
    assert [len(body["prompt"]) for body in (a, b, c)] == [600, 1000, 20]
    assert a["prompt"][:512] == b["prompt"][:512]
    assert a["prompt"][512:] != b["prompt"][512:600]
    assert [(ask.input_tokens, ask.output_tokens) for ask in asks] == [(600, 5), (1000, 7), (20, 1)]


def test_sampling_goes_into_the_body_and_decides_what_is_exact() -> None:
    target = Endpoint(url="http://x", model="m", sampling={"n": 2, "temperature": 0.5})
    ask = Prompts(load(osl="9"), target, IDS).request(0, 0, None, ())
    assert json.loads(ask.body)["temperature"] == 0.5
    assert ask.output_tokens == 18
    assert Prompts(load(ignore_eos=False), TARGET, IDS).request(0, 0, None, ()).output_tokens is None
    usage = json.loads(Prompts(load(tokens_in_chunks=True), TARGET, IDS).request(0, 0, None, ()).body)["stream_options"]
    assert usage["continuous_usage_stats"] is True


def test_a_text_server_without_words_is_refused() -> None:
    with pytest.raises(ConfigError, match="--tokenizer"):
        Prompts(load(), CHAT, IDS)


def test_prompts_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "hi", "max_tokens": 3}\n\n{"prompt_token_ids": [5, 6]}\n')
    found = bodies(load(prompts=str(path), osl="8"), count=3)
    assert [body["prompt"] for body in found] == ["hi", [5, 6], "hi"]
    assert [body["max_tokens"] for body in found] == [3, 8, 3]
    with pytest.raises(ConfigError, match="--api completions"):
        check_api(read_prompts(path), "chat")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no rows"),
        ("{}\n", "line 1"),
        ("[1]\n", "line 1"),
        ("[" * 100_000, "line 1: it is nested too deeply"),
        ('{"prompt": "a", "max_tokens": "x"}\n', "line 1"),
    ],
)
def test_bad_files_of_prompts(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_prompts(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prompts(tmp_path / "none")


def test_words_of_a_tokenizer(tmp_path: Path) -> None:
    vocab = {"[UNK]": 0, "\u0120red": 1, "\u0120green": 2, "blue": 3, "\u0120Ab": 4, "\u0120x": 5, "\u0120caf": 6}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert set(_local_words(str(tmp_path))) == {" red", " green", " caf"}
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        (tmp_path / "tokenizer.json").write_text("{}")
        _local_words(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://h:1/v1/", "http://h:1"),
        ("https://h/base/v1", "https://h/base"),
    ],
)
def test_urls(text: str, url: str) -> None:
    assert parse_url(text) == url


@pytest.mark.parametrize("text", ["", "ftp://x", "http://", "http://h:99999999", "http://h/?a=1"])
def test_bad_urls(text: str) -> None:
    with pytest.raises(ConfigError, match=r"http://127\.0\.0\.1:8000"):
        parse_url(text)


def test_the_request_as_sent() -> None:
    target = Endpoint(url="http://h:1", headers=(("Authorization", "Bearer k"),))
    text = http_request(target, "h:1", "/v1/completions", b"{}")
    assert text.startswith(b"POST /v1/completions HTTP/1.1\r\nHost: h:1\r\n")
    assert b"\r\nAuthorization: Bearer k\r\n\r\n{}" in text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"streams": None}, "0 kinds of arrivals"),
        ({"trace": "x"}, "2 kinds of arrivals"),
        ({"num_requests": None}, "no end"),
        ({"num_requests": 0}, "--num-requests 0"),
        ({"streams": 20_000}, "outside 1..10000"),
        ({"prefixes": 2}, "4x512"),
        ({"calls": 2}, "--calls 2 with --turns 1"),
        ({"calls": 0}, "--calls 0"),
        ({"streams": 6000, "calls": 2, "turns": 2}, "12000 requests at once, over --max-streams 10000"),
        ({"isl": "much"}, "--isl 'much'"),
    ],
)
def test_bad_loads(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(**settings)
