"""A model's config.json by its Hugging Face id, from a cache that is made up and from a server on this machine."""

import json
import threading
import urllib.error
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from kervan.errors import ConfigError
from kervan.observe import hub

MODEL = "Qwen/Qwen3-8B"
CONFIG = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
COMMIT = "b968826d9c46dd6066d109eabc6255188de91218"


class Hub(ThreadingHTTPServer):
    """Gives `answers` by path: (status, headers, body). `asked`: paths with their headers."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.asked: list[tuple[str, dict[str, str]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def give(self, file: str, body: Any, status: int = 200, **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        names = {key.replace("_", "-"): value for key, value in headers.items()}
        self.answers[file if file.startswith("/") else f"/{MODEL}/resolve/main/{file}"] = (status, names, content)


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.server.asked.append((self.path, dict(self.headers)))
        status, headers, body = self.server.answers.get(self.path, (404, {}, b""))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Hub() as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield found
        found.shutdown()
        thread.join()


@pytest.fixture
def environ(server: Hub, tmp_path: Path) -> dict[str, str]:
    return {"HF_HOME": str(tmp_path), "HF_ENDPOINT": server.url}


def cached(hub_cache: Path, **files: Any) -> Path:
    """A cache as huggingface_hub writes it: files are links to blobs."""
    repository = hub_cache / "models--Qwen--Qwen3-8B"
    snapshot = repository / "snapshots" / COMMIT
    for directory in (snapshot, repository / "refs", repository / "blobs"):
        directory.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for name, content in files.items():
        (repository / "blobs" / name).write_text(json.dumps(content))
        (snapshot / f"{name}.json").symlink_to(Path("../../blobs") / name)
    return snapshot


@pytest.mark.parametrize(
    ("variables", "directory"),
    [
        ({"HF_HUB_CACHE": "{}/a", "HF_HOME": "{}/b"}, "a"),
        ({"HF_HOME": "{}/b", "XDG_CACHE_HOME": "{}/c"}, "b/hub"),
        ({"XDG_CACHE_HOME": "{}/c"}, "c/huggingface/hub"),
    ],
)
def test_the_cache_is_where_the_variables_say(tmp_path: Path, variables: dict[str, str], directory: str) -> None:
    environ = {name: value.format(tmp_path) for name, value in variables.items()}
    cached(tmp_path / directory, config=CONFIG)
    assert hub.cache(environ) == tmp_path / directory
    assert hub.read_config(MODEL, environ | {"HF_HUB_OFFLINE": "1"}) == CONFIG


def test_without_variables_it_is_in_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.cache({}) == tmp_path / ".cache" / "huggingface" / "hub"


def test_the_cache_comes_first_and_with_the_quantisation(environ: dict[str, str], server: Hub, tmp_path: Path) -> None:
    cached(tmp_path / "hub", config=CONFIG, hf_quant_config={"quantization": {"quant_algo": "FP8"}})
    found = hub.read_config(MODEL, environ)
    assert found["quantization_config"] == {"quantization": {"quant_algo": "FP8"}}
    assert server.asked == []


def test_a_snapshot_without_the_file_is_fetched(environ: dict[str, str], server: Hub, tmp_path: Path) -> None:
    cached(tmp_path / "hub")
    server.give("config.json", CONFIG)
    assert hub.read_config(MODEL, environ) == CONFIG
    assert [path for path, _ in server.asked] == [
        f"/{MODEL}/resolve/main/config.json", f"/{MODEL}/resolve/main/hf_quant_config.json",
    ]  # fmt: skip


def test_both_files_are_fetched(environ: dict[str, str], server: Hub) -> None:
    server.give("config.json", CONFIG)
    server.give("hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4"}})
    assert hub.read_config(MODEL, environ)["quantization_config"] == {"quantization": {"quant_algo": "NVFP4"}}
    server.asked.clear()
    server.give("config.json", CONFIG | {"quantization_config": {"quant_method": "fp8"}})
    assert hub.read_config(MODEL, environ)["quantization_config"] == {"quant_method": "fp8"}
    assert len(server.asked) == 1


def test_a_redirect_is_followed(environ: dict[str, str], server: Hub) -> None:
    server.give("config.json", b"", 307, Location="/api/resolve-cache/x")
    server.give("/api/resolve-cache/x", CONFIG)
    assert hub.read_config(MODEL, environ) == CONFIG


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_means_nothing_is_asked(environ: dict[str, str], server: Hub, name: str) -> None:
    server.give("config.json", CONFIG)
    with pytest.raises(ConfigError, match=rf"not in the Hugging Face cache .*{name}=true.*fetch its config\.json into"):
        hub.read_config(MODEL, environ | {name: "true"})
    assert server.asked == []
    assert hub.read_config(MODEL, environ | {name: "0"}) == CONFIG


@pytest.mark.parametrize(
    ("status", "headers", "words"),
    [
        (401, {}, r"\(HTTP 401\); check the name, or give HF_TOKEN if it is gated or private"),
        (403, {}, r"\(HTTP 403\); check the name, or give HF_TOKEN"),
        (404, {"X-Error-Code": "RepoNotFound"}, r"\(HTTP 404\); check the name, or give HF_TOKEN"),
        (404, {"X-Error-Code": "EntryNotFound"}, r"has no config\.json .*in Hugging Face format"),
        (503, {}, r"\(HTTP 503\); fetch its config\.json into a directory"),
    ],
)
def test_refusals(environ: dict[str, str], server: Hub, status: int, headers: dict[str, str], words: str) -> None:
    server.give("config.json", b"no", status, **headers)
    with pytest.raises(ConfigError, match=words):
        hub.read_config(MODEL, environ)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"<html>", r"config\.json cannot be read as JSON"),
        (b"[]", "holds a JSON list"),
        (b"{}", "lacks architectures and model_type"),
        (b" " * (hub.MAX_BYTES + 1), r"more than 4,194,304 bytes"),
    ],
)
def test_answers_that_are_no_config(environ: dict[str, str], server: Hub, body: bytes, words: str) -> None:
    server.give("config.json", body)
    with pytest.raises(ConfigError, match=words):
        hub.read_config(MODEL, environ)


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    environ = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    with pytest.raises(ConfigError, match=r"cannot be reached \(.*refused\); fetch its config\.json into a directory"):
        hub.read_config(MODEL, environ)
    with pytest.raises(ConfigError, match=r"HF_ENDPOINT='hf\.co' is not a URL"):
        hub.read_config(MODEL, environ | {"HF_ENDPOINT": "hf.co"})


def test_a_server_that_trickles_is_given_up(
    environ: dict[str, str], server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.give("config.json", CONFIG)
    times_s = iter((0.0, 11.0))
    monkeypatch.setattr(hub.time, "monotonic", lambda: next(times_s))
    with pytest.raises(ConfigError, match=r"config\.json took more than 10 s"):
        hub.read_config(MODEL, environ)


def test_a_token_is_not_sent_in_the_clear(environ: dict[str, str], server: Hub) -> None:
    server.give("config.json", CONFIG)
    hub.read_config(MODEL, environ | {"HF_TOKEN": "hf_secret"})
    assert all("Authorization" not in headers for _, headers in server.asked)


@pytest.mark.parametrize(
    ("location", "has_token"),
    [
        ("https://huggingface.co/api/resolve-cache/x", True),
        ("https://cdn.huggingface.co/x", False),
        ("https://huggingface.co:8443/x", False),
    ],
)
def test_a_token_stays_with_its_host(location: str, has_token: bool) -> None:
    first = hub.request(f"https://huggingface.co/{MODEL}/resolve/main/config.json", "hf_secret")
    assert first.get_header("Authorization") == "Bearer hf_secret"
    following = hub._Redirects().redirect_request(first, None, 302, "Found", {}, location)
    assert following.has_header("Authorization") == has_token


@pytest.mark.parametrize("location", ["http://huggingface.co/x", "ftp://huggingface.co/x"])
def test_a_redirect_out_of_https_is_not_followed(location: str) -> None:
    first = hub.request("https://huggingface.co/x", "hf_secret")
    with pytest.raises(urllib.error.URLError, match="it redirects to"):
        hub._Redirects().redirect_request(first, None, 302, "Found", {}, location)


def test_a_token_that_does_not_help_is_told() -> None:
    refused = hub._Hub(MODEL, {"HF_TOKEN": "hf_secret"})._refused(403)
    assert "ask for access at https://huggingface.co/Qwen/Qwen3-8B" in str(refused)
    assert "hf_secret" not in str(refused)
