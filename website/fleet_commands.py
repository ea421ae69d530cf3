"""Records what commands print with `--json` on a running fleet, for the reference: fleet_commands.json.

    python website/fleet_commands.py

Starts a fleet of twins with a key on this machine (Ray and vLLM are needed, no GPU), and ends it. A test compares what
it recorded with what a fleet prints today (tests/integration/test_twins.py).
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from reference import REPOSITORY, collect

from kervan.ports import free_port

HERE = Path(__file__).parent
RECORDED = HERE / "fleet_commands.json"
MODEL = "src/kervan/demo/trained"
NAME = "reference"
UP = ("--engine", "twin", "--gpu", "H200", "--replicas", "1..2", "--gateways", "1", "--detach")
KEY = "key-of-the-reference"


def kervan(*words: str) -> str:
    """What a command prints. Raises: CalledProcessError."""
    done = subprocess.run(
        [sys.executable, "-m", "kervan", *words], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def fields(text: str) -> dict[str, str]:
    """Types by path."""
    found: dict[str, str] = {}
    collect("", json.loads(text), found)
    return found


def recorded(port: int, request_id: str) -> dict[str, Any]:
    """By command: as a user types it, and its fields."""
    url = f"http://127.0.0.1:{port}"
    load = ("bench", url, "--streams", "2", "--duration", "3s", "--isl", "16", "--osl", "16")
    shown = {
        "kervan status": (("status", "--name", NAME), "kervan status"),
        "kervan autoscale": (("autoscale", "--name", NAME), "kervan autoscale"),
        "kervan usage": (("usage", "--name", NAME), "kervan usage"),
        "kervan explain": (("explain", request_id, "--name", NAME), "kervan explain REQUEST_ID"),
        "kervan bench": (load, "kervan bench http://127.0.0.1:8000 --streams 2 --duration 3s --isl 16 --osl 16"),
        "kervan doctor": (("doctor", "--name", NAME), "kervan doctor"),
    }
    made = {}
    for title, (words, command) in shown.items():
        made[title] = {"command": f"{command} --json", "fields": fields(kervan(*words, "--json"))}
    return made


def ask(port: int) -> str:
    """The id of one answer."""
    import urllib.request

    body = {"model": NAME, "prompt": "Hello", "max_tokens": 8}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(),
        {"content-type": "application/json", "authorization": f"Bearer {KEY}"},
    )  # fmt: skip
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=60) as response:
        return str(json.load(response)["id"])


def main() -> None:
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="kervan-") as home:
        os.environ |= {"KERVAN_HOME": home, "KERVAN_API_KEY": KEY}
        try:
            told = kervan(
                "up", MODEL, "--name", NAME, "--port", str(port), *UP, "--json",
                "--engine-arg", "max_model_len=2048", "--engine-arg", f"served_model_name={NAME}",
            )  # fmt: skip
            up = {"kervan up": {"command": "kervan up MODEL --detach --json", "fields": fields(told)}}
            made = up | recorded(port, ask(port))
        finally:
            subprocess.run([sys.executable, "-m", "kervan", "down", "--name", NAME], check=False)
    RECORDED.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
