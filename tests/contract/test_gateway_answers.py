"""What gateways with vLLM's app answer themselves, and what one of them has and all must give."""

import json
import re
from typing import Any
from urllib.parse import quote

import httpx
import psutil
import pytest
from harness.gateway_trio import FLEET_NAME, KEY, ORIGIN, GatewayTrio

import kervan

pytestmark = pytest.mark.timeout(600)

WITH_KEY = {"authorization": f"Bearer {KEY}"}
READABLE = ([ORIGIN], ["true"], ["Origin"], ["named"], ["yes"])
PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,x-request-id"}


def browser(url: str) -> httpx.Client:
    """A page of ORIGIN that names its requests."""
    headers = {"origin": ORIGIN, "x-request-id": "named", "content-type": "application/json"}
    return httpx.Client(base_url=url, timeout=60, headers=headers, verify=False)


def readable(response: httpx.Response) -> tuple[Any, ...]:
    names = ("access-control-allow-origin", "access-control-allow-credentials", "vary", "x-request-id", "x-marked")
    return tuple(response.headers.get_list(name) for name in names)


@pytest.mark.parametrize(
    ("method", "path", "options", "status"),
    [
        ("GET", "/health", {}, 200),
        ("GET", "/health/ready", {}, 200),
        ("HEAD", "/health", {}, 200),
        ("GET", "/metrics", {}, 200),
        ("DELETE", "/metrics", {}, 405),
        ("GET", "/kervan/status", {"headers": WITH_KEY}, 200),
        ("GET", "/v1/models", {}, 401),
        ("POST", "/v1/completions", {"content": b"[]"}, 401),
        ("POST", "/v1/completions", {"content": b"[]", "headers": WITH_KEY}, 400),
        ("POST", "/v1/completions", {"content": bytes(9 << 20), "headers": WITH_KEY}, 413),
        ("GET", "/generate", {"headers": WITH_KEY}, 405),
        ("OPTIONS", "/generate", {}, 405),
        ("POST", "/generate", {"content": b"[]", "headers": WITH_KEY}, 400),
        ("POST", "/chat", {"content": b"{", "headers": WITH_KEY}, 400),
        ("GET", "/v1/streams/x", {"headers": WITH_KEY}, 404),
        # vLLM's, to compare with.
        ("POST", "/generate", {"content": b'{"prompt": "a", "model": "no"}', "headers": WITH_KEY}, 404),
        ("GET", "/v1/models", {"headers": WITH_KEY}, 200),
        ("GET", "/nothing", {"headers": WITH_KEY}, 404),
        ("GET", "/docs", {}, 200),
    ],
)
def test_own_answers_have_the_headers_of_vllms(
    trio: GatewayTrio, method: str, path: str, options: dict[str, Any], status: int
) -> None:
    with browser(trio.urls[0]) as page:
        response = page.request(method, path, **options)
    assert response.status_code == status, response.text
    assert readable(response) == READABLE


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [("/health", {}, 200), ("/health/ready", {}, 503), ("/v1/models", {}, 401), ("/v1/models", WITH_KEY, 503)],
)
def test_own_answers_have_them_before_vllms_app_is_there(
    trio: GatewayTrio, path: str, headers: dict[str, str], status: int
) -> None:
    with browser(trio.lone_url) as page:
        response = page.get(path, headers=headers)
        assert page.options(path, headers=PREFLIGHT).status_code == 200
    assert response.status_code == status
    assert readable(response) == READABLE


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/generate", "/health", "/kervan/status", "/v1/streams/x"])
def test_preflights_need_no_key_and_end_as_in_vllm(trio: GatewayTrio, path: str) -> None:
    with browser(trio.urls[0]) as page:
        allowed = page.options(path, headers=PREFLIGHT)
        refused = page.options(path, headers={**PREFLIGHT, "access-control-request-method": "DELETE"})
    assert (allowed.status_code, allowed.text) == (200, "OK")
    assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
    assert (refused.status_code, refused.text) == (400, "Disallowed CORS method")


def test_pages_of_other_origins_read_nothing(trio: GatewayTrio) -> None:
    with browser(trio.urls[0]) as page:
        for path in ("/health", "/v1/models"):
            response = page.get(path, headers={"origin": "https://other.example"})
            assert "access-control-allow-origin" not in response.headers


def test_the_api_describes_itself_to_all_and_is_called_with_a_key(trio: GatewayTrio) -> None:
    with browser(trio.urls[0]) as page:
        assert "/openapi.json" in page.get("/docs").text
        described = page.get("/openapi.json").json()
        assert page.post("/openapi.json").status_code == 401
        # By vLLM's apps and not by those before them; of those in one process, one counts.
        assert {httpx.get(f"{url}/v1/models", headers=WITH_KEY).status_code for url in trio.urls} == {200}
        assert "http_requests_total{" in page.get("/metrics").text
    assert (described["info"]["title"], described["info"]["version"]) == (FLEET_NAME, kervan.__version__)
    own = {path for path, item in described["paths"].items() if "'kervan'" in str(item)}
    streams = "/v1/streams/{stream_id}"
    requests = "/kervan/requests/{request_id}"
    assert own == {"/generate", "/chat", streams, requests, "/kervan/status", "/health", "/health/ready", "/metrics"}
    assert "/v1/chat/completions" in described["paths"]
    assert described["security"] == [{"api_key": []}]
    assert described["paths"]["/health"]["get"]["security"] == []
    assert set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(described))) <= set(
        described["components"]["schemas"]
    )


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("bad_words", b'{"prompt": "a", "max_tokens": 2, "bad_words": ["\\ud800"]}'),
        ("extra_args", b'{"prompt": "a", "max_tokens": 2, "vllm_xargs": {"a": "x\\udfff"}}'),
        ("extra_args", b'{"prompt": "a", "max_tokens": 2, "vllm_xargs": {"a": %d}}' % 2**64),
        ("", b'{"prompt": "a", "max_tokens": 2, "cache_salt": "\\ud800"}'),
        ("", b'{"prompt": ["a", "b"], "max_tokens": 2, "request_id": "\\ud800"}'),
    ],
)
def test_what_has_no_encoding_is_refused_and_nothing_is_left_of_it(trio: GatewayTrio, field: str, body: bytes) -> None:
    for more in (b"}", b', "n": 2}', b', "stream": true}'):
        sent = body[:-1] + more
        with client(trio.urls[0]) as at:
            answer = at.post("/v1/completions", content=sent, headers={"content-type": "application/json"})
            assert answer.status_code == 400 or '"code": 400' in answer.text, (sent, answer.text)
            assert field in answer.text
            assert at.get("/kervan/status").json()["streams"] == 0
    assert trio.ask("left")["requests"] == 0


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"input": [{}] * 3000}),
        ("/v1/responses", {"input": "a", "tools": [0] * 3000}),
        ("/v1/chat/completions", {"messages": [{}] * 3000}),
        ("/v1/chat/completions/batch", {"messages": [[{}] * 3000]}),
        ("/tokenize", {"messages": [0] * 3000}),
    ],
)
def test_a_list_is_refused_for_its_first_wrong_entry(trio: GatewayTrio, path: str, body: dict[str, Any]) -> None:
    """All entries' errors would take 14 s and 1.4 GB."""
    process = psutil.Process(trio.pid)
    before_s = sum(process.cpu_times()[:2])
    with client(trio.urls[0]) as at:
        status, message = error_of(at.post(path, json=body))
    assert status == 400
    assert message
    assert sum(process.cpu_times()[:2]) - before_s < 1


def client(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=60, headers=WITH_KEY, verify=False)


def respond(at: httpx.Client, **more: Any) -> httpx.Response:
    return at.post("/v1/responses", json={"input": "Hello", "max_output_tokens": 5, **more})


def error_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["message"]


@pytest.mark.parametrize("more", [{}, {"request_id": "resp_mine"}, {"request_id": "a b/c?%2e"}])
def test_a_stored_response_is_given_by_all_gateways(trio: GatewayTrio, more: dict[str, str]) -> None:
    with client(trio.urls[0]) as a, client(trio.urls[1]) as b:
        made = respond(a, **more)
        assert made.status_code == 200, made.text
        name = made.json()["id"]
        assert name == more.get("request_id", name)
        for at in (a, b):
            if "/" not in name:  # vLLM's path has no way to say it
                assert at.get(f"/v1/responses/{quote(name)}").json()["output"] == made.json()["output"]
                assert error_of(at.post(f"/v1/responses/{name}/cancel")) == (
                    400,
                    "Cannot cancel a synchronous response.",
                )
            following = respond(at, previous_response_id=name)
            assert (following.status_code, following.json()["previous_response_id"]) == (200, name), following.text
            streamed = respond(at, previous_response_id=name, stream=True)
            assert "response.completed" in streamed.text
            # The next turn is kept where the first one is.
            assert following.json()["id"].startswith("resp_gw-a_")


def test_a_background_response_is_followed_and_cancelled_from_all_gateways(trio: GatewayTrio) -> None:
    with client(trio.urls[0]) as a, client(trio.urls[1]) as b:
        body = {"background": True, "max_output_tokens": 1500, "stream": False, "input": "Hello"}
        name = a.post("/v1/responses", json={**body, "ignore_eos": True}).json()["id"]
        assert b.get(f"/v1/responses/{name}").json()["status"] in ("queued", "in_progress", "completed")
        assert b.post(f"/v1/responses/{name}/cancel").status_code in (200, 400)  # it may be over
        assert a.get(f"/v1/responses/{name}").json()["status"] in ("cancelled", "completed")
        name = respond(a, background=True, stream=True).text.split('"id":"')[1].split('"')[0]
        assert "response.completed" in b.get(f"/v1/responses/{name}", params={"stream": True}).text


def test_a_response_that_no_gateway_keeps_is_told_so(trio: GatewayTrio) -> None:
    gone = f"resp_gw-gone_{'0' * 32}"
    with client(trio.urls[0]) as at:
        for answer in (at.get(f"/v1/responses/{gone}"), respond(at, previous_response_id=gone)):
            status, message = error_of(answer)
            assert (status, message) == (
                410,
                f"response {gone} was kept by gateway gw-gone, which has ended, and is lost with it; "
                "send the conversation as input",
            )
        for name in ("resp_x", f"resp_gw-a_{'0' * 32}", f"resp_gw-b_{'0' * 32}"):
            assert error_of(at.get(f"/v1/responses/{name}")) == (404, f"Response with id '{name}' not found.")
        assert error_of(respond(at, previous_response_id="x\r\ny: z"))[0] == 404


def models(at: httpx.Client) -> set[str]:
    return {card["id"] for card in at.get("/v1/models").json()["data"]} - {"tiny"}


def test_adapters_are_loaded_and_unloaded_for_all_gateways(trio: GatewayTrio) -> None:
    def change(at: httpx.Client, what: str, name: str) -> httpx.Response:
        return at.post(f"/v1/{what}_lora_adapter", json={"lora_name": name, "lora_path": f"/adapters/{name}"})

    def answers(at: httpx.Client, name: str) -> int:
        return at.post("/v1/completions", json={"model": name, "prompt": "a", "max_tokens": 2}).status_code

    with client(trio.urls[0]) as a, client(trio.urls[1]) as b:
        for name, at in (("first", a), ("second", b)):
            assert change(at, "load", name).status_code == 200
            assert {answers(a, name), answers(b, name)} == {200}
            assert {change(a, "load", name).status_code, change(b, "load", name).status_code} == {400}
        assert models(a) == models(b) >= {"first", "second"}
        with client(trio.ask("join")) as c:
            assert models(c) == models(a)
            assert change(c, "unload", "first").status_code == 200
            assert change(c, "load", "third").status_code == 200
        trio.ask("leave")
        assert (answers(a, "first"), answers(b, "first"), answers(b, "third")) == (404, 404, 200)
        for name, at in (("third", a), ("second", a)):
            assert change(at, "unload", name).status_code == 200
        assert (models(a) | models(b)) & {"first", "second", "third"} == set()
