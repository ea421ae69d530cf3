"""The description of the API at /openapi.json and /docs: vLLM's, with the gateway's own endpoints, keys and name."""

import asyncio
import functools
from typing import Any

import msgspec

from kervan import __version__
from kervan.gateway.asgi import ASGIApp, ErrorResponse, Receive, Scope, Send
from kervan.gateway.explain import RequestExplained
from kervan.gateway.simple import ChatRequest, ChatResponse, GenerateRequest, GenerateResponse
from kervan.vendor.vllm_names import SCALE_PATH

# vLLM has schemas of the same names.
_REF = "#/components/schemas/Kervan{name}"
_KEY = "api_key"
_TAG = "kervan"


class HealthPage(msgspec.Struct):
    """Answer of GET /health and /health/ready. `reason`: why not, where it is not ready."""

    status: str
    reason: str = ""


class StatusPage(msgspec.Struct):
    """Answer of GET /kervan/status: what the fleet is, the streams of this gateway, and how many of them each replica
    has.
    """

    gateway: str
    fleet: str
    about: dict[str, Any]
    streams: int
    held: int
    moved: int
    given_up: int
    replicas: dict[str, int]
    directory: dict[str, Any]
    directory_heard_s: float | None


def describing(app: Any, *, fleet_name: str, has_keys: bool) -> ASGIApp:
    """The FastAPI `app`, which describes the gateway's own endpoints with its own.

    The document is made for its first reader, in a thread: it takes over a second, and streams go on meanwhile.
    """
    app.title, app.version = fleet_name, __version__
    app.description = "A fleet of vLLM replicas behind kervan: vLLM's own endpoints, and those tagged kervan."
    describe_vllm = app.openapi
    app.openapi = functools.cache(lambda: extended(describe_vllm(), has_keys=has_keys))

    async def described(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == app.openapi_url:
            await asyncio.to_thread(app.openapi)
        await app(scope, receive, send)

    return described


def extended(document: dict[str, Any], *, has_keys: bool) -> dict[str, Any]:
    """vLLM's OpenAPI document with the gateway's own paths, which take the place of vLLM's of the same name."""
    paths, schemas = _own_paths()
    components = document.get("components", {})
    kept = {path: item for path, item in document.get("paths", {}).items() if path != SCALE_PATH}
    document = {
        **document,
        "paths": {**kept, **paths},
        "components": {**components, "schemas": {**components.get("schemas", {}), **schemas}},
    }
    if has_keys:
        scheme = {"type": "http", "scheme": "bearer", "description": "One of the fleet's API keys"}
        document["components"]["securitySchemes"] = {**components.get("securitySchemes", {}), _KEY: scheme}
        document["security"] = [{_KEY: []}]
    return document


def _own_paths() -> tuple[dict[str, Any], dict[str, Any]]:
    types = (
        GenerateRequest,
        GenerateResponse,
        ChatRequest,
        ChatResponse,
        HealthPage,
        StatusPage,
        ErrorResponse,
        RequestExplained,
    )
    refs, components = msgspec.json.schema_components(types, ref_template=_REF)
    schema = dict(zip(types, refs, strict=True))
    answer = {kind: {"application/json": {"schema": schema[kind]}} for kind in types}
    text = {"schema": {"type": "string"}}
    health, errors = answer[HealthPage], answer[ErrorResponse]
    replayed = {
        "name": "Last-Event-ID",
        "in": "header",
        "required": False,
        "description": "The last `id` that the client has; without it, all events",
        "schema": {"type": "string"},
    }
    stream_id = {
        "name": "stream_id",
        "in": "path",
        "required": True,
        "description": "The header X-Kervan-Stream-Id of the first answer",
        "schema": {"type": "string"},
    }
    request_id = {
        "name": "request_id",
        "in": "path",
        "required": True,
        "description": "The `id` of the answer, its header X-Kervan-Stream-Id, or the client's own X-Request-Id",
        "schema": {"type": "string"},
    }
    paths = {
        "/generate": {
            "post": _operation(
                "generate",
                "Complete a text",
                {200: ("The text", answer[GenerateResponse]), 400: ("A body that is not accepted", errors)},
                requestBody={"required": True, "content": answer[GenerateRequest]},
            )
        },
        "/chat": {
            "post": _operation(
                "chat",
                "Answer a conversation; messages are as in /v1/chat/completions",
                {
                    200: ("The answer", {**answer[ChatResponse], "text/event-stream": text}),
                    400: ("A body that is not accepted", errors),
                },
                requestBody={"required": True, "content": answer[ChatRequest]},
            )
        },
        "/v1/streams/{stream_id}": {
            "get": _operation(
                "stream",
                "Continue a stream whose connection was lost (with replay_s)",
                {
                    200: ("The events after Last-Event-ID", {"text/event-stream": text}),
                    404: ("Unknown or expired", errors),
                    410: ("It cannot continue from there", errors),
                },
                parameters=[stream_id, replayed],
            )
        },
        "/kervan/status": {
            "get": _operation("status", "This gateway's streams", {200: ("Counts", answer[StatusPage])})
        },
        "/kervan/requests/{request_id}": {
            "get": _operation(
                "explain",
                "Where the time of one of the last requests went",
                {200: ("Its parts", answer[RequestExplained]), 404: ("No gateway remembers it", errors)},
                parameters=[request_id],
            )
        },
        "/health": {"get": _open("health", "Whether the gateway is alive", {200: ("It is", health)})},
        "/health/ready": {
            "get": _open("ready", "Whether a replica can answer", {200: ("It can", health), 503: ("Why not", health)})
        },
        "/metrics": {
            "get": _open("metrics", "Prometheus metrics of all gateways", {200: ("The page", {"text/plain": text})})
        },
    }
    return paths, {f"Kervan{name}": component for name, component in components.items()}


def _operation(name: str, summary: str, answers: dict[int, tuple[str, dict[str, Any]]], **more: Any) -> dict[str, Any]:
    responses = {str(status): {"description": text, "content": content} for status, (text, content) in answers.items()}
    return {"operationId": f"kervan_{name}", "summary": summary, "tags": [_TAG], "responses": responses, **more}


def _open(name: str, summary: str, answers: dict[int, tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """An operation without a key."""
    return _operation(name, summary, answers, security=[])
