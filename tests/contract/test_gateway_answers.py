"""What gateways with vLLM's app answer themselves, and what one of them has and all must give."""

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from harness.gateway_trio import FLEET_NAME, KEY, ORIGIN, GatewayTrio
from harness.shared_fleet import Models

import kervan

pytestmark = pytest.mark.timeout(600)

WITH_KEY = {"authorization": f"Bearer {KEY}"}
READABLE = ([ORIGIN], ["true"], ["Origin"], ["named"])
PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,x-request-id"}


@pytest.fixture(scope="module")
def trio(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayTrio]:
    running = GatewayTrio(models.demo, tmp_path_factory.mktemp("trio"))
    yield running
    running.close()


def browser(url: str) -> httpx.Client:
    """A page of ORIGIN that names its requests."""
    headers = {"origin": ORIGIN, "x-request-id": "named", "content-type": "application/json"}
    return httpx.Client(base_url=url, timeout=60, headers=headers, verify=False)


def readable(response: httpx.Response) -> tuple[Any, ...]:
    names = ("access-control-allow-origin", "access-control-allow-credentials", "vary", "x-request-id")
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
        assert {httpx.get(f"{url}/version", headers=WITH_KEY).status_code for url in trio.urls} == {200}
        assert "http_requests_total{" in page.get("/metrics").text
    assert (described["info"]["title"], described["info"]["version"]) == (FLEET_NAME, kervan.__version__)
    own = {path for path, item in described["paths"].items() if "'kervan'" in str(item)}
    streams = "/v1/streams/{stream_id}"
    assert own == {"/generate", "/chat", streams, "/kervan/status", "/health", "/health/ready", "/metrics"}
    assert "/v1/chat/completions" in described["paths"]
    assert described["security"] == [{"api_key": []}]
    assert described["paths"]["/health"]["get"]["security"] == []
    assert set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(described))) <= set(
        described["components"]["schemas"]
    )
