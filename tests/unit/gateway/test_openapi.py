import json
import re

import msgspec
import pytest

from kervan.gateway.openapi import extended
from kervan.gateway.shell import OPEN_PATHS, SIMPLE_PATHS, STATUS_PATH
from kervan.gateway.simple import ChatRequest, GenerateRequest

VLLM = {
    "info": {"title": "FastAPI"},
    "paths": {"/v1/models": {"get": {}}, "/health": {"get": {"summary": "vLLM's"}}, "/scale_elastic_ep": {"post": {}}},
    "components": {"schemas": {"GenerateRequest": {"title": "vLLM's"}}},
}


def test_own_endpoints_stand_beside_vllms() -> None:
    document = extended(VLLM, has_keys=False)
    paths = document["paths"]
    own = OPEN_PATHS | SIMPLE_PATHS.keys() | {STATUS_PATH, "/v1/streams/{stream_id}", "/kervan/requests/{request_id}"}
    assert paths.keys() == own | {"/v1/models"}
    assert paths["/health"]["get"]["summary"] != "vLLM's"
    schemas = document["components"]["schemas"]
    assert schemas["GenerateRequest"] == {"title": "vLLM's"}
    assert set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document))) <= schemas.keys()
    assert "security" not in document
    for kind in (GenerateRequest, ChatRequest):
        described = schemas[f"Kervan{kind.__name__}"]
        assert described["properties"].keys() == {field.name for field in msgspec.structs.fields(kind)}
        assert described["additionalProperties"] is False


@pytest.mark.parametrize("path", ["/generate", "/v1/models", "/health", "/metrics"])
def test_keys_are_asked_for_where_the_gateway_wants_one(path: str) -> None:
    document = extended(VLLM, has_keys=True)
    (scheme,) = document["components"]["securitySchemes"].values()
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    (operation,) = document["paths"][path].values()
    assert operation.get("security", document["security"]) == ([] if path in OPEN_PATHS else [{"api_key": []}])
