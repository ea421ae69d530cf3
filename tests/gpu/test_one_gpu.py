"""On one GPU, with random weights: a killed engine comes back on the same GPU and its streams end whole.

Needs vLLM for CUDA. Runs without the project's pytest plugins too:
    python3 -m pytest -c /dev/null --rootdir . -s tests/gpu/test_one_gpu.py
"""

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from harness.places import REPOSITORY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="needs an NVIDIA GPU"),
]
PORT = 8123
NUM_STREAMS = 16
NUM_TOKENS = 1500
PROMPT = [11, 12, 13, 14] * 64
ENGINE = ("load_format=dummy", "max_model_len=4096", "enable_prefix_caching=false", "served_model_name=shape")


def gpu_memory_mib() -> int:
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])


def kervan(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kervan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def up_command(model: Path) -> list[str]:
    engine = [word for argument in ENGINE for word in ("--engine-arg", argument)]
    return ["up", str(model), "--name", "gpu-test", "--port", str(PORT), "--detach", *engine]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 8B shape with 4 layers."""
    place = tmp_path_factory.mktemp("model")
    config = json.loads((REPOSITORY / "benchmarks/models/llama3-8b/config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    script = REPOSITORY / "benchmarks/shape_model.py"
    subprocess.run([sys.executable, script, place / "config.json", place / "shape"], check=True)
    return place / "shape"


@pytest.fixture(scope="module")
def memory_before_mib() -> int:
    return gpu_memory_mib()


@pytest.fixture(scope="module")
def fleet(model: Path, memory_before_mib: int) -> Iterator[None]:
    done = kervan(*up_command(model))
    assert done.returncode == 0, done.stderr
    yield
    kervan("down", "--name", "gpu-test")
    assert_memory_free(memory_before_mib)


def assert_memory_free(before_mib: int) -> None:
    deadline_s = time.monotonic() + 20
    while gpu_memory_mib() > before_mib + 64 and time.monotonic() < deadline_s:
        time.sleep(0.2)
    assert gpu_memory_mib() <= before_mib + 64


def replica() -> dict[str, Any]:
    done = kervan("status", "--name", "gpu-test", "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)["replicas"][0]
    return found


class Stream(threading.Thread):
    """One streamed completion; counts tokens as they come."""

    def __init__(self) -> None:
        super().__init__()
        self.chunks = 0
        self.tokens = 0
        self.finish = ""
        self.error = ""
        self.longest_gap_s = 0.0

    def run(self) -> None:
        body = {"model": "shape", "prompt": PROMPT, "max_tokens": NUM_TOKENS, "ignore_eos": True, "temperature": 0}
        status, answer = post({**body, "stream": True, "stream_options": {"include_usage": True}})
        last_s = time.monotonic()
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            now_s = time.monotonic()
            if self.chunks:
                self.longest_gap_s = max(self.longest_gap_s, now_s - last_s)
            last_s = now_s
            self.chunks += 1
            event = json.loads(line[6:])
            self.error = self.error or json.dumps(event.get("error", ""))[:200].strip('"')
            for choice in event.get("choices", ()):
                self.finish = choice["finish_reason"] or self.finish
            if event.get("usage"):
                self.tokens = event["usage"]["completion_tokens"]
        if status != 200:
            self.error = str(status)


def post(body: dict[str, Any]) -> tuple[int, http.client.HTTPResponse]:
    connection = http.client.HTTPConnection(urlsplit(f"http://127.0.0.1:{PORT}").netloc, timeout=300)
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    answer = connection.getresponse()
    return answer.status, answer


def test_limits_of_the_gpu_runner_are_400_not_a_dead_engine(fleet: None) -> None:
    before = replica()["pid"]
    body = {"model": "shape", "prompt": PROMPT, "max_tokens": 4}
    for poison in (
        {"logit_bias": {str(i): 1.0 for i in range(1100)}},
        {"stop_token_ids": list(range(1000)), "min_tokens": 2},
        {"allowed_token_ids": list(range(2000))},
        {"bad_words": [f"word{i}" for i in range(500)]},
    ):
        status, answer = post({**body, **poison})
        text = answer.read().decode()
        print(f"{next(iter(poison))}: {status} {text[:160]}")
        assert status in (200, 400), text
    assert replica()["pid"] == before
    assert post(body)[0] == 200


def test_a_killed_engine_comes_back_on_its_gpu_and_its_streams_end_whole(fleet: None) -> None:
    before = replica()["pid"]
    streams = [Stream() for _ in range(NUM_STREAMS)]
    for stream in streams:
        stream.start()
    while not all(stream.chunks > 100 for stream in streams):
        assert not any(stream.error for stream in streams), [stream.error for stream in streams]
        time.sleep(0.01)
    seen = sorted(stream.chunks for stream in streams)
    os.kill(before, signal.SIGKILL)
    for stream in streams:
        stream.join(400)
    after = replica()["pid"]
    gap_s = max(stream.longest_gap_s for stream in streams)
    print(f"killed at {seen[0]} to {seen[-1]} chunks; longest gap {gap_s:.1f} s; pid {before} -> {after}")
    assert [stream.error for stream in streams] == [""] * NUM_STREAMS
    assert {(stream.tokens, stream.finish) for stream in streams} == {(NUM_TOKENS, "length")}
    assert after != before


def test_ctrl_c_during_start_up_leaves_no_gpu_memory(model: Path, memory_before_mib: int) -> None:
    """Last: it wants the GPU for itself."""
    home = model.parent / "home"
    environment = {**os.environ, "KERVAN_HOME": str(home)}
    kervan("down", "--name", "gpu-test")
    assert_memory_free(memory_before_mib)
    command = [sys.executable, "-m", "kervan", *up_command(model)]
    starting = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    deadline_s = time.monotonic() + 200
    while gpu_memory_mib() < memory_before_mib + 1000:
        assert starting.poll() is None
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    starting.send_signal(signal.SIGINT)
    assert starting.wait(60) == 130
    assert_memory_free(memory_before_mib)
