"""Requests that no client should send, made from a gateway's own description of its API.

A body begins as a valid one of its endpoint; then fields of the endpoint's schema are added, values are exchanged, and the
text itself is damaged. `seed` and `number` name a case: the same ones make the same request.
"""

import gzip
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

JSON = b"application/json"
MANY = 5_000  # entries of an enormous array
LONG = 50_000  # characters of an enormous string
DEEP = 3_000  # levels of a nesting that exhausts parsers

# A valid body each, as small as it can be. Endpoints that are not here begin with an empty object.
MESSAGES = [{"role": "user", "content": "hello"}]
VALID: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hello", "max_tokens": 4},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 4},
    "/v1/chat/completions/batch": {"messages": [MESSAGES, MESSAGES], "max_tokens": 4},
    "/v1/responses": {"input": "hello", "max_output_tokens": 4},
    "/v1/messages": {"messages": MESSAGES, "model": "tiny", "max_tokens": 4},
    "/v1/messages/count_tokens": {"messages": MESSAGES, "model": "tiny"},
    "/generative_scoring": {"query": "a", "items": ["b"], "label_token_ids": [1, 2]},
    "/invocations": {"prompt": "hello", "max_tokens": 4},
    "/tokenize": {"prompt": "hello"},
    "/detokenize": {"tokens": [1, 2]},
    "/generate": {"prompt": "hello", "max_tokens": 4},
    "/chat": {"messages": MESSAGES, "max_tokens": 4},
}
# Their limits of an answer's length: to the end of the context is a fair request, but a long one.
LENGTHS = ("max_tokens", "max_output_tokens", "max_completion_tokens")
TWICE_AS_OFTEN = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/chat")
# They change the gateways for later cases, or have tests of their own.
LEFT_OUT = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters")

NUMBERS: list[Any] = [
    *(0, -1, 1, 2, 3, 0.5, -0.0, 1e-9, 1e30, 1.5, 2**31 - 1, 2**31, -(2**31), 2**32, 2**63 - 1, 2**63, -(2**63) - 1),
    *(2**64, 2**70, -(2**70), 10**400, float("nan"), float("inf"), float("-inf")),
]
TEXTS = [
    "",
    "x",
    "tiny",
    "auto",
    "none",
    "\0",
    "\ud800",
    "a\udfff",
    "\U0001f42b" * 50,
    "1",
    "{}",
    "null",
    "../../x",
    "%s{0}",
]
KEYS = [
    "type",
    "role",
    "content",
    "text",
    "name",
    "a",
    "5",
    "-1",
    "function",
    "json",
    "__class__",
    "$ref",
    "",
    "\ud800",
]
CONTENT_TYPES = [
    *(
        b"",
        b"text/plain",
        b"application/json; charset=utf-16",
        b"application/json; charset=no-such",
        b"application/JSON",
    ),
    *(
        b"application/x-www-form-urlencoded",
        b"multipart/form-data",
        b"multipart/form-data; boundary=x",
        b"\xff/\xfe",
        b"json",
    ),
    *(b"application/vnd.api+json", b"application/json;;=;", b"application/jsonx"),
]


@dataclass(frozen=True, slots=True)
class Case:
    """A request: its content type, other headers as they are written, and its body."""

    path: str
    content_type: bytes
    headers: bytes
    body: bytes

    def as_bytes(self, key: str) -> bytes:
        """HTTP/1.1 on a connection that stays."""
        content_type = b"content-type: %s\r\n" % self.content_type if self.content_type else b""
        head = f"POST {self.path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n".encode()
        return b"%s%s%scontent-length: %d\r\n\r\n%s" % (head, content_type, self.headers, len(self.body), self.body)


class OddBodies:
    """`described`: an OpenAPI document."""

    def __init__(self, described: dict[str, Any]) -> None:
        self._schemas = described["components"]["schemas"]
        posts = {path: item["post"] for path, item in described["paths"].items() if "post" in item and "{" not in path}
        self._fields = {path: self._fields_of(post) for path, post in posts.items() if path not in LEFT_OUT}
        self._paths = sorted([*self._fields, *TWICE_AS_OFTEN])

    def case(self, seed: int, number: int) -> Case:
        """One of them."""
        rng = random.Random(f"{seed} {number}")
        path = rng.choice(self._paths)
        body: Any = json.loads(json.dumps(VALID.get(path, {})))
        for _ in range(rng.choice((1, 1, 2, 3))):
            body = self._change(rng, path, body)
        if isinstance(body, dict):
            for name in LENGTHS:
                if name in VALID.get(path, {}) and not _is_short(body.get(name)):
                    body[name] = 4
            # A response that goes on without its client would be found among those that were left over.
            body.pop("background", None)
        return _as_text(rng, path, body)

    # ---- values

    def _change(self, rng: random.Random, path: str, body: Any) -> Any:
        fields = self._fields[path]
        kind = rng.random()
        if kind < 0.55 and fields and isinstance(body, dict):
            name = rng.choice(sorted(fields))
            shaped = rng.random() < 0.6
            body[name] = self._shaped(rng, fields[name], 0) if shaped else _odd(rng, 0)
        elif kind < 0.85:
            body = _exchange(rng, body)
        elif kind < 0.9 and isinstance(body, dict) and body:
            del body[rng.choice(sorted(body))]
        elif isinstance(body, dict):
            body[rng.choice(KEYS)] = _odd(rng, 0)
        return body

    def _shaped(self, rng: random.Random, schema: Any, depth: int) -> Any:
        """A value that a schema allows, or nearly: patterns and bounds are not looked at."""
        schema = self._resolved(schema)
        if depth > 6 or not schema or rng.random() < 0.04:
            return _odd(rng, depth)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return rng.choice(schema["enum"])
        for word in ("anyOf", "oneOf", "allOf"):
            if word in schema:
                return self._shaped(rng, rng.choice(schema[word]), depth + 1)
        kind = schema.get("type")
        if kind == "object":
            properties, required = schema.get("properties", {}), schema.get("required", ())
            names = [name for name in properties if name in required or rng.random() < 0.3]
            if not properties:
                return {rng.choice(KEYS): self._shaped(rng, schema.get("additionalProperties"), depth + 1)}
            return {name: self._shaped(rng, properties[name], depth + 1) for name in names}
        if kind == "array":
            return [self._shaped(rng, schema.get("items"), depth + 1) for _ in range(rng.randrange(4))]
        if kind in ("integer", "number"):
            return rng.choice((0, 1, 2, -1, 5, rng.choice(NUMBERS)))
        if kind == "boolean":
            return rng.random() < 0.5
        return rng.choice(TEXTS) if kind == "string" else None

    def _resolved(self, schema: Any) -> Any:
        while isinstance(schema, dict) and "$ref" in schema:
            schema = self._schemas[schema["$ref"].rpartition("/")[2]]
        return schema if isinstance(schema, dict) else {}

    def _fields_of(self, post: Any) -> dict[str, Any]:
        content = post.get("requestBody", {}).get("content", {}).get("application/json", {})
        todo, found = [content.get("schema", {})], {}
        while todo:
            schema = self._resolved(todo.pop())
            found |= schema.get("properties", {})
            todo += [part for word in ("anyOf", "oneOf", "allOf") for part in schema.get(word, ())]
        return found


def _is_short(value: Any) -> bool:
    """Whether an answer of so many tokens is short, or refused."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value is not None and not (isinstance(value, str) and value.strip().isdigit())
    return value < 100 or value > 10_000


def _odd(rng: random.Random, depth: int) -> Any:
    kind = rng.random()
    if depth < 4 and kind < 0.12:
        return [_odd(rng, depth + 1) for _ in range(rng.randrange(4))]
    if depth < 4 and kind < 0.24:
        return {rng.choice(KEYS): _odd(rng, depth + 1) for _ in range(rng.randrange(3))}
    if kind < 0.27:
        return [rng.choice((0, "a", None, [], {}, -1))] * MANY
    if kind < 0.29:
        return "a" * LONG
    if kind < 0.31:
        return _nested(rng.choice((40, 200, 450)))
    if kind < 0.6:
        return rng.choice(NUMBERS)
    return rng.choice((None, True, False, [], {}, *TEXTS))


def _nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


def _exchange(rng: random.Random, body: Any) -> Any:
    """One value somewhere in it by another one, or by itself as a list, a text or an object."""
    places: list[tuple[Any, Any]] = []
    todo = [body]
    while todo and len(places) < 200:
        inner = todo.pop()
        if isinstance(inner, dict | list):
            for key in list(inner) if isinstance(inner, dict) else range(min(len(inner), 20)):
                places.append((inner, key))
                todo.append(inner[key])
    if not places or rng.random() < 0.03:
        return _odd(rng, 0)
    holder, key = rng.choice(places)
    value = holder[key]
    changes: tuple[Callable[[], Any], ...] = (
        lambda: _odd(rng, 0),
        lambda: _odd(rng, 0),
        lambda: [value],
        lambda: {"a": value},
        lambda: str(value)[:100],
        lambda: [value, value],
    )
    holder[key] = rng.choice(changes)()
    return body


# ---- text


def _as_text(rng: random.Random, path: str, body: Any) -> Case:
    text = json.dumps(body, ensure_ascii=rng.random() < 0.8)
    if rng.random() < 0.3:
        text = text.replace("Infinity", "1e400")
    content_type, headers = JSON, b""
    data = text.encode("utf-8", "surrogatepass")
    kind = rng.random()
    if kind < 0.80:
        return Case(path, content_type, headers, data)
    if kind < 0.84 and data.startswith(b"{") and len(data) > 2:  # the same names twice
        data = data[:-1] + b"," + data[1:]
    elif kind < 0.87:
        data = data[: rng.randrange(len(data) + 1)]
    elif kind < 0.90:
        places = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            if places:
                places[rng.randrange(len(places))] = rng.randrange(256)
        data = bytes(places)
    elif kind < 0.92:
        data = text.encode(rng.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "utf-7")), "surrogatepass")
    elif kind < 0.93:
        data = rng.choice((b"[" * DEEP, b'{"a":' * DEEP, b'{"a":' + b"[" * DEEP + b"]" * DEEP + b"}"))
    elif kind < 0.94:
        data = data[:-1] + b', "n": ' + b"9" * rng.choice((20, 400, 5_000)) + b"}"
    elif kind < 0.97:
        content_type = rng.choice(CONTENT_TYPES)
    else:
        encoding = rng.choice((b"gzip", b"br", b"identity", b"\xff"))
        headers = b"content-encoding: %s\r\n" % encoding
        data = gzip.compress(data, mtime=0) if encoding == b"gzip" else data
    return Case(path, content_type, headers, data)
