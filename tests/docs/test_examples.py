"""Every example is run: Python against two vLLM replicas, fleet files on twins, or checked as far as before a start."""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from harness.live import Fleet, Home
from harness.places import MODELS, REPOSITORY
from harness.shared_fleet import Models
from openai import OpenAI
from tokenizers import Tokenizer

from kervan.cli.plan import plan
from kervan.config import fleet as fleets
from kervan.demo import PAIRS, TOOL_TURN
from kervan.fleet.vllm import arguments
from kervan.ports import free_port

EXAMPLES = REPOSITORY / "examples"
FILES = sorted(EXAMPLES.rglob("*.yaml"))
SCRIPTS = sorted(path for path in EXAMPLES.rglob("*") if path.suffix in (".py", ".sh"))
CLIENTS = {
    "langchain_chat.py": "langchain-openai",
    "llamaindex_chat.py": "llama-index-llms-openai-like",
    "litellm_chat.py": "litellm",
}
# Fleets that a machine without nodes and GPUs can start as twins; those of spot.yaml have their tests in test_pools.py.
STARTED = ("one_gpu.yaml", "one_node.yaml", "agents.yaml", "spot.yaml", "several_models/chat.yaml")
UV = Path(sys.executable).parent / "uv"


def names(paths: list[Path]) -> list[Any]:
    return [pytest.param(path, id=str(path.relative_to(EXAMPLES))) for path in paths]


@pytest.mark.parametrize("path", names(FILES))
def test_a_fleet_file_is_one_that_up_and_vllm_accept(path: Path) -> None:
    config = fleets.from_mapping(fleets.load_file(path), str(path))
    arguments.check(config.engine_args)
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize("path", names(FILES + SCRIPTS))
def test_every_example_is_named_in_a_readme(path: Path) -> None:
    readmes = [EXAMPLES / "README.md", path.parent / "README.md"]
    assert any(path.name in readme.read_text() for readme in readmes if readme.exists())


def test_models_on_one_port_have_the_same_port_and_other_names() -> None:
    chat, code = (yaml.safe_load((EXAMPLES / f"several_models/{name}.yaml").read_text()) for name in ("chat", "code"))
    assert chat["port"] == code["port"]
    assert chat["shared_port"] and code["shared_port"]
    assert chat["name"] != code["name"]


def test_the_70b_fleet_is_the_one_that_the_planner_recommends(capsys: pytest.CaptureFixture[str]) -> None:
    plan.main([str(MODELS / "llama3-70b"), "--gpu", "H200", "--gpus", "8", "--json"], standalone_mode=False)
    planned = json.loads(capsys.readouterr().out)
    best = planned["candidates"][planned["best"]] if isinstance(planned["best"], int) else planned["best"]
    file = yaml.safe_load((EXAMPLES / "llama3_70b/fleet.yaml").read_text())
    assert (file["tp"], file.get("pp", 1), file["replicas"]) == (best["tp"], best["pp"], best["dp"])
    del file["engine_args"]["served_model_name"]
    assert file["engine_args"] == planned["launch"]["engine_args"]


# ---- Python, against real engines


@pytest.fixture
def run(fleet: Fleet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs an example with the shared fleet's URL; what it printed."""

    def run(name: str, *more: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, fleet.url, *more])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


QUESTION = "What is a caravan?"


@pytest.mark.fleet
@pytest.mark.parametrize("more", [(), ("tiny",)])
def test_chat(run: Callable[..., str], more: tuple[str, ...]) -> None:
    assert run("chat.py", *more) == PAIRS[QUESTION] + "\n"


@pytest.mark.fleet
def test_lora_answers_with_each_model(run: Callable[..., str]) -> None:
    answers = dict(line.split(": ", 1) for line in run("lora.py").splitlines() if ": " in line)
    assert PAIRS[QUESTION].startswith(answers["tiny"])
    assert not PAIRS[QUESTION].startswith(answers["adapter"])


@pytest.mark.fleet
def test_the_agent_calls_its_tool_and_reports_by_its_schema(fleet: Fleet, models: Models) -> None:
    agent = runpy.run_path(str(EXAMPLES / "agent.py"))
    # The schema bounds all but the space between its parts, and some tiny models love new lines.
    tokenizer = Tokenizer.from_file(str(models.demo / "tokenizer.json"))
    blanks = [number for number in range(tokenizer.get_vocab_size()) if tokenizer.decode([number]).isspace()]
    with OpenAI(base_url=f"{fleet.url}/v1", api_key="none", max_retries=0) as client:
        text, messages = agent["ask"](client, "tiny", TOOL_TURN[0]["content"])
        assert text == TOOL_TURN[3]["content"]
        assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
        found = agent["report"](client, "tiny", text, seed=1, logit_bias={str(number): -100 for number in blanks})
    assert set(found) == {"city", "sky", "celsius"}
    assert found["sky"] in agent["REPORT"]["properties"]["sky"]["enum"]
    assert -60 <= found["celsius"] <= 60


@pytest.mark.fleet
def test_the_70b_chat_needs_the_standard_library_only(run: Callable[..., str]) -> None:
    told = run("llama3_70b/chat.py").splitlines()
    assert told[0] == "health: 200"
    assert PAIRS[QUESTION].startswith(told[1])
    assert told[2].startswith("64 tokens, the first after ") or told[1] == PAIRS[QUESTION]


@pytest.mark.fleet
@pytest.mark.exhaustive
@pytest.mark.parametrize("script", CLIENTS)
def test_other_libraries_clients_stream_the_answer(fleet: Fleet, script: str) -> None:
    words = [UV, "run", "--quiet", "--no-project", "--python", sys.executable, "--with", CLIENTS[script], "python"]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [*words, EXAMPLES / "clients" / script, fleet.url, "tiny"],
        env=env, cwd=fleet.home.scratch, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == PAIRS[QUESTION] + "\n"


@pytest.mark.fleet
@pytest.mark.exhaustive
def test_a_batch_job_answers_every_prompt_in_order(fleet: Fleet, tmp_path: Path) -> None:
    prompts = [
        {"prompt": f"{number} camels", "model": "tiny", "max_tokens": 8, "temperature": 0} for number in range(9)
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in prompts))
    done = subprocess.run(
        [sys.executable, EXAMPLES / "batch.py", tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl", fleet.name],
        env=fleet.home.environment, cwd=fleet.home.scratch, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("9 answers, ")
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    with fleet.client() as client:
        for asked, answer in zip(prompts, answers, strict=True):
            over_http = client.post("/v1/completions", json=asked).json()["choices"][0]["text"]
            assert answer["text"] == over_http


# ---- fleets, as twins


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", STARTED)
def test_a_fleet_file_starts_and_answers(twins: Fleet, home: Home, models: Models, name: str) -> None:
    served = yaml.safe_load((EXAMPLES / name).read_text())["engine_args"]["served_model_name"]
    options = ("--config", str(EXAMPLES / name), "--engine", "twin", "--gpu", "H200", "--twin", "base_s=0.01")
    running = home.up(models.demo, f"example-{FILES.index(EXAMPLES / name)}", ("max_model_len=2048",), *options)
    try:
        body = {"model": served, "prompt": [5, 6, 7], "max_tokens": 4}
        answer = httpx.post(f"{running.url}/v1/completions", json=body, timeout=60).json()
        assert answer["usage"]["completion_tokens"] == 4
    finally:
        assert home.kervan("down", "--name", running.name).returncode == 0


@pytest.mark.exhaustive
def test_the_70b_steps_run_as_one_on_twins(twins: Fleet, tmp_path: Path) -> None:
    script = EXAMPLES / "llama3_70b/try.sh"
    more = {"KERVAN": f"{sys.executable} -m kervan", "PYTHON": sys.executable, "STREAMS": "1,2", "RATES": "1,2"}
    as_twins = ["--engine", "twin", "--gpu", "H200", "--replicas", "2", "--port", str(free_port())]
    words = ["bash", script, tmp_path / "out", MODELS / "llama3-70b", *as_twins]
    done = subprocess.run(
        words, env={**twins.home.environment, **more, "SECONDS_EACH": "3"}, cwd=twins.home.scratch,
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    assert "health: 200" in done.stdout
    assert "llama3-70b: stopped" in done.stdout
    assert (tmp_path / "out/rates.html").stat().st_size > 10_000
    assert list((tmp_path / "out/monitoring").rglob("*.json"))
