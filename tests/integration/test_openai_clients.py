"""Clients as they are, unmodified, against a fleet: the `openai` SDK, and kervan's own two endpoints."""

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from harness.live import SMALL, Fleet, Home, eventually, is_alive
from harness.shared_fleet import Models
from openai import OpenAI
from tokenizers import Tokenizer

from kervan.demo import PAIRS, TOOL_TURN, WEATHER_TOOL

MODEL = "tiny"
QUESTION, ANSWER = next(iter(PAIRS.items()))
LIKELIEST = {"top_k": 1}  # greedy in effect; vLLM takes no n above 1 at temperature 0
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture
def client(fleet: Fleet) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{fleet.url}/v1", api_key="none", timeout=60, max_retries=0) as client:
        yield client


def ask(question: str) -> list[Any]:
    return [{"role": "user", "content": question}]


@pytest.mark.parametrize("question", PAIRS)
def test_chat(client: OpenAI, question: str) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=ask(question), temperature=0)
    assert answer.choices[0].message.content == PAIRS[question]
    assert answer.choices[0].finish_reason == "stop"
    usage = answer.usage
    assert usage is not None
    assert usage.prompt_tokens + usage.completion_tokens == usage.total_tokens


@pytest.mark.parametrize("question", PAIRS)
def test_streamed_chat(client: OpenAI, question: str) -> None:
    pieces, usage, finish_reasons = [], None, []
    for chunk in client.chat.completions.create(
        model=MODEL, messages=ask(question), temperature=0, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            pieces += [choice.delta.content] if choice.delta.content else []
            finish_reasons += [choice.finish_reason] if choice.finish_reason else []
    assert "".join(pieces) == PAIRS[question]
    assert finish_reasons == ["stop"]
    assert usage is not None
    assert usage.completion_tokens >= len(pieces) >= 1


def test_stream_comes_in_pieces(client: OpenAI) -> None:
    """Seconds of generation; how many pieces is a matter of speed: vLLM joins tokens that are not fetched yet."""
    chunks = client.completions.create(
        model=MODEL, prompt="hello", max_tokens=1000, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    pieces = [chunk.choices[0].text for chunk in chunks if chunk.choices and chunk.choices[0].text]
    assert len(pieces) >= 10


def test_conversation_goes_on(client: OpenAI) -> None:
    messages = [*TOOL_TURN[:3]]
    answer = client.chat.completions.create(
        model=MODEL,
        messages=messages,  # type: ignore[arg-type]
        tools=[WEATHER_TOOL],  # type: ignore[list-item]
        temperature=0,
    )
    assert answer.choices[0].message.content == TOOL_TURN[3]["content"]


def test_completion(client: OpenAI) -> None:
    first = " ".join(ANSWER.split()[:5])
    whole = client.completions.create(model=MODEL, prompt=first, temperature=0, max_tokens=150)
    assert whole.choices[0].text.startswith(" group") or whole.choices[0].text in ANSWER
    streamed = client.completions.create(model=MODEL, prompt=first, temperature=0, max_tokens=150, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole.choices[0].text


def test_several_prompts_and_several_answers(client: OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=["a", "b"], n=2, max_tokens=5, temperature=1, seed=7)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    chat = client.chat.completions.create(model=MODEL, messages=ask(QUESTION), n=2, extra_body=LIKELIEST)
    assert [choice.message.content for choice in chat.choices] == [ANSWER, ANSWER]


def test_streamed_n2(client: OpenAI) -> None:
    texts = {0: "", 1: ""}
    for chunk in client.chat.completions.create(
        model=MODEL, messages=ask(QUESTION), n=2, stream=True, extra_body=LIKELIEST
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == {0: ANSWER, 1: ANSWER}


def test_chat_logprobs(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=ask(QUESTION), temperature=0, max_tokens=20, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 20
    for token in logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token  # greedy
        assert token.logprob <= 0
    assert "".join(token.token for token in logprobs.content) == answer.choices[0].message.content


def test_completion_logprobs(client: OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="A caravan", temperature=0, max_tokens=4, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert len(logprobs.token_logprobs) == 4


def test_stop_strings(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=ask(QUESTION), temperature=0, stop=["silk", " salt"])
    assert answer.choices[0].message.content == ANSWER[: ANSWER.index("silk")]
    assert answer.choices[0].finish_reason == "stop"
    pieces = client.chat.completions.create(
        model=MODEL, messages=ask(QUESTION), temperature=0, stop=["silk"], stream=True
    )
    text = "".join(choice.delta.content or "" for chunk in pieces for choice in chunk.choices)
    assert text == ANSWER[: ANSWER.index("silk")]


def test_usage_is_exact(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=ask(QUESTION), max_tokens=37, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 37
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_json_schema(client: OpenAI, models: Models, stream: bool) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    # The schema bounds all but the space between its parts, and some models that this training makes love new lines.
    tokenizer = Tokenizer.from_file(str(models.demo / "tokenizer.json"))
    blanks = [number for number in range(tokenizer.get_vocab_size()) if tokenizer.decode([number]).isspace()]
    arguments: dict[str, Any] = {
        "model": MODEL, "messages": ask("Who?"), "max_tokens": 200, "seed": 1,
        "logit_bias": {str(number): -100 for number in blanks},
    }  # fmt: skip
    if stream:
        chunks = client.chat.completions.create(**arguments, response_format=wanted, stream=True)
        text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    else:
        answer = client.chat.completions.create(**arguments, response_format=wanted)
        text = answer.choices[0].message.content
    person = json.loads(text)
    assert set(person) == {"name", "age"}
    assert isinstance(person["name"], str)
    assert person["age"] in range(100)


def test_choice_and_regex(client: OpenAI) -> None:
    for outputs, allowed in (
        ({"choice": ["camel", "dune"]}, {"camel", "dune"}),
        ({"regex": "(yes|no)!"}, {"yes!", "no!"}),
    ):
        answer = client.chat.completions.create(
            model=MODEL, messages=ask("?"), extra_body={"structured_outputs": outputs}
        )
        assert answer.choices[0].message.content in allowed


@pytest.mark.parametrize("choice", ["auto", "named"])
def test_tools(client: OpenAI, choice: str) -> None:
    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[*TOOL_TURN[:1]],  # type: ignore[list-item]
        tools=[WEATHER_TOOL],  # type: ignore[list-item]
        tool_choice=named if choice == "named" else "auto",
        temperature=0,
    )
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == [  # type: ignore[union-attr]
        ("get_weather", {"city": "Ankara"})
    ]
    if choice == "auto":
        assert answer.choices[0].finish_reason == "tool_calls"


def test_streamed_tool_call(client: OpenAI) -> None:
    name = arguments = ""
    for chunk in client.chat.completions.create(
        model=MODEL,
        messages=[*TOOL_TURN[:1]],  # type: ignore[list-item]
        tools=[WEATHER_TOOL],  # type: ignore[list-item]
        temperature=0,
        stream=True,
    ):
        for choice in chunk.choices:
            for call in choice.delta.tool_calls or ():
                assert call.function is not None
                name += call.function.name or ""
                arguments += call.function.arguments or ""
    assert (name, json.loads(arguments)) == ("get_weather", {"city": "Ankara"})


def test_responses(client: OpenAI) -> None:
    answer = client.responses.create(model=MODEL, input=QUESTION, temperature=0)
    assert answer.output_text == ANSWER
    assert answer.status == "completed"
    with client.responses.stream(model=MODEL, input=QUESTION, temperature=0) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    assert text == ANSWER


def test_models(client: OpenAI) -> None:
    models = {model.id: model for model in client.models.list()}
    assert set(models) == {"tiny", "adapter"}
    assert models["tiny"].model_extra["max_model_len"] == 2048  # type: ignore[index]


def test_adapter_changes_the_answer(client: OpenAI) -> None:
    plain = client.chat.completions.create(model=MODEL, messages=ask(QUESTION), temperature=0)
    adapted = [
        client.chat.completions.create(model="adapter", messages=ask(QUESTION), temperature=0, max_tokens=20)
        .choices[0]
        .message.content
        for _ in range(4)
    ]
    assert plain.choices[0].message.content == ANSWER
    assert adapted[0]
    assert not ANSWER.startswith(adapted[0])
    assert len(set(adapted)) == 1  # whichever replica answers


def test_unknown_model(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no-such-model"):
        client.chat.completions.create(model="no-such-model", messages=ask(QUESTION))


def test_tokenize(fleet: Fleet) -> None:
    with fleet.client() as client:
        told = client.post("/tokenize", json={"model": MODEL, "prompt": ANSWER}).json()
        assert told["count"] == len(told["tokens"])
        back = client.post("/detokenize", json={"model": MODEL, "tokens": told["tokens"]}).json()
    assert back["prompt"].removeprefix("<|bos|>") == ANSWER


def test_generate(fleet: Fleet) -> None:
    with fleet.client() as client:
        body = {"prompt": "A caravan", "max_tokens": 12, "temperature": 0}
        told = client.post("/generate", json=body).json()
        same = client.post("/v1/completions", json={"model": MODEL, **body}).json()
        assert told == {"text": same["choices"][0]["text"], "tokens": 12}
        stopped = client.post("/generate", json={**body, "stop": told["text"][3:8]}).json()
        assert stopped["text"] == told["text"][:3]


def test_simple_chat(fleet: Fleet) -> None:
    body = {"messages": ask(QUESTION), "temperature": 0, "max_tokens": 200}
    with fleet.client() as client:
        told = client.post("/chat", json=body).json()
        assert told["content"] == ANSWER
        assert told["usage"]["total_tokens"] == told["usage"]["prompt_tokens"] + told["usage"]["completion_tokens"]
        lines = client.post("/chat", json={**body, "stream": True}).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert "".join(event["content"] for event in events) == ANSWER
    assert events[-1]["usage"]["total_tokens"] == told["usage"]["total_tokens"]
    assert events[-1]["finish_reason"] == "stop"


def test_a_second_fleet_disturbs_nobody(fleet: Fleet, home: Home, models: Any) -> None:
    """Embeddings behind an API key, on the same Ray; it comes and goes while the first fleet is in use."""
    before = (fleet.pids(), fleet.gateway_pids())
    answers, is_over = [], threading.Event()

    def use_the_first_fleet() -> None:
        body = {"messages": ask(QUESTION), "temperature": 0, "max_tokens": 200}
        with fleet.client(timeout=120) as client:
            while not is_over.wait(1.0):
                answers.append(client.post("/chat", json=body).json().get("content"))

    user = threading.Thread(target=use_the_first_fleet)
    user.start()
    try:
        second = home.up(models.embedding, "embed", (*SMALL, "max_model_len=512"), "--api-key", "sk-right")
        status = second.status()
        pids = [part["pid"] for part in (*status["replicas"], *status["gateways"])]
        assert len(pids) == 2
        with OpenAI(base_url=f"{second.url}/v1", api_key="sk-right", max_retries=0) as client:
            model = client.models.list().data[0].id
            same = client.embeddings.create(model=model, input=["camel", "a dry well", "camel"]).data
            vectors = [item.embedding for item in same]
            assert [len(vector) for vector in vectors] == [128] * 3
            assert vectors[0] == pytest.approx(vectors[2], abs=1e-4)
            assert vectors[0] != pytest.approx(vectors[1], abs=1e-2)
            assert sum(x * x for x in vectors[0]) == pytest.approx(1, abs=1e-3)
            with pytest.raises(openai.BadRequestError):
                client.embeddings.create(model=model, input=["a " * 2000])
        with (
            OpenAI(base_url=f"{second.url}/v1", api_key="sk-wrong", max_retries=0) as stranger,
            pytest.raises(openai.AuthenticationError),
        ):
            stranger.embeddings.create(model=model, input="camel")
        assert httpx.get(f"{second.url}/health/ready").status_code == 200

        done = home.kervan("down", "--name", "embed")
        assert (done.returncode, done.stdout) == (0, "embed: stopped\n"), done.stderr
        eventually(lambda: not any(map(is_alive, pids)), f"processes {pids} are gone", 20)
    finally:
        is_over.set()
        user.join()
    assert home.fleets() == ["main"]
    assert answers == [ANSWER] * len(answers)
    assert len(answers) > 3
    assert (fleet.pids(), fleet.gateway_pids()) == before
