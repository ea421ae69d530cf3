"""`kervan plan`: its JSON, and one clear line for what makes no sense."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from harness.command_line import Kervan
from harness.places import MODELS

from kervan.facts import weight_files


def config(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((MODELS / name / "config.json").read_text())
    return found


SMALL = str(MODELS / "llama3-8b")
KEYS = {
    "tp", "pp", "dp", "ep", "gpus", "fits", "kv_tokens", "concurrency", "out_tok_s", "ttft_p50_ms", "ttft_p99_ms",
    "tpot_p50_ms", "tpot_p99_ms", "usd_per_mtok", "binding", "score",
}  # fmt: skip


@pytest.fixture
def kervan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Kervan:
    return Kervan(monkeypatch, capsys, "plan")


def test_json(kervan: Kervan) -> None:
    found = kervan.json(SMALL, "--gpu", "H200", "--gpus", 2, "--concurrency", 4, "--osl", 32, "--price", "3.40/h")
    assert found["best"] == 0
    assert {(c["tp"], c["pp"], c["dp"]) for c in found["candidates"]} == {(1, 1, 2), (2, 1, 1), (1, 2, 1)}
    for row in found["candidates"]:
        assert row.keys() >= KEYS
        # Dollars per hour over millions of tokens per hour.
        assert row["usd_per_mtok"] == pytest.approx(2 * 3.4 / (row["out_tok_s"] * 3600 / 1e6), rel=1e-3)


def test_one_layout_and_a_table(kervan: Kervan) -> None:
    words = (SMALL, "--gpu", "H200", "--gpus", 4, "--layout", "tp=2,pp=2", "--isl", "32..512", "--osl", 16)
    [row] = kervan.json(*words, "--concurrency", 2)["candidates"]
    assert (row["tp"], row["pp"], row["dp"], row["gpus"]) == (2, 2, 1, 4)
    code, out, _ = kervan.run(*words, "--concurrency", 2, "--explain")
    assert code == 0
    assert "TP2xPP2" in out
    assert "kervan up" in out


def test_a_trace_and_rates(kervan: Kervan, tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    rows = [f"2023-11-16 18:17:{i:02d}.0000000,{200 + i},{20 + i}" for i in range(30)]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n")
    words = (SMALL, "--gpu", "H200", "--gpus", 1)
    # 30 requests in 29 s, of 34.5 tokens each.
    assert kervan.json(*words, "--trace", path)["candidates"][0]["out_tok_s"] == pytest.approx(35.7, rel=0.3)
    slow, fast = (kervan.json(*words, "--osl", 32, "--rate", rate)["candidates"][0] for rate in ("2/s", "9000/s"))
    assert slow["ttft_p50_ms"] < fast["ttft_p50_ms"]
    assert "overloaded" in fast["reason"]


def test_a_prompt_of_a_trace_that_is_too_long_is_named(kervan: Kervan, tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:00,9,1\n2023-11-16 18:17:01,9000,30\n")
    error = kervan.fails(SMALL, "--gpu", "H200", "--trace", path)
    assert "line 3 of the trace has a prompt of 9000 (ContextTokens or input_length) and 30 output tokens" in error
    assert "leave such rows out, or a model of more than 8192 tokens" in error


def test_what_scripts_read_of_model_and_strategies(kervan: Kervan) -> None:
    found = kervan.json(SMALL, "--gpu", "H200", "--gpus", 1, "--concurrency", 4, "--osl", 32)
    assert found["keeps_slo"] is True
    assert [strategy.keys() for strategy in found["strategies"]] == [{"name", "use", "reason"}] * 4
    model = found["model"]
    assert model["parameters"] == pytest.approx(8.03e9, rel=1e-3)
    assert model["kv_bytes_per_token"] == 32 * 2 * 8 * 128 * 2
    assert model["weights_bytes"] == pytest.approx(2 * model["parameters"], rel=1e-3)
    assert model["quantization"] == "16 bit"
    assert kervan.json("--facts", SMALL) == model


def test_facts_are_one_line(kervan: Kervan) -> None:
    code, out, _ = kervan.run(SMALL, "--facts")
    assert code == 0
    assert "8.03B parameters" in out
    assert "131,072 bytes of KV cache per token" in out


def test_facts_take_no_option_that_they_do_not_use(kervan: Kervan) -> None:
    for words in (("--rate", "5/s", "--slo", "ttft=1s"), ("--rate", "5/s", "--slo", "ttft=1s", "--json")):
        assert "does not use --rate, --slo; leave them out" in kervan.fails(SMALL, "--facts", *words)
    assert "does not use --gpus; leave it out" in kervan.fails(SMALL, "--facts", "--gpus", 8)


def test_how_many_gpus_for_a_rate(kervan: Kervan) -> None:
    """8B on H200 takes about 29.5 requests/s of 1,024 in and 128 out within 50 ms: four for 100, a tenth to spare."""
    words = (SMALL, "--gpu", "H200", "--osl", 128, "--rate", "100/s", "--layout", "tp=1")
    found = kervan.json(*words)
    best = found["candidates"][0]
    assert (best["tp"], best["pp"], best["dp"]) == (1, 1, 4)
    assert found["gpus"] == 4
    assert found["keeps_slo"]
    code, out, _ = kervan.run(*words)
    assert code == 0
    assert out.startswith("4 GPUs: 4 x TP1")
    assert kervan.run(SMALL, "--gpu", "H200", "--rate", "1/s", "--layout", "tp=1")[1].startswith("1 GPU: TP1")


def test_the_first_thing_that_anybody_types(kervan: Kervan) -> None:
    """No pipelines, no overload: eight copies of 8B, as many requests as they take."""
    code, out, _ = kervan.run(SMALL, "--gpu", "H200", "--gpus", 8)
    assert code == 0
    first = out.splitlines()[0]
    assert first.startswith(
        "8 x TP1: the model fits one GPU: data parallel copies; keeps the SLO (ttft=2s,tpot=50ms) up to "
    )
    assert "overloaded" not in out


def test_gpus_beyond_a_node_are_on_nodes_of_eight(kervan: Kervan) -> None:
    """No tensor parallelism over 16 GPUs, which no link joins."""
    found = kervan.json(SMALL, "--gpu", "H200", "--gpus", 16, "--concurrency", 16, "--osl", 8)
    assert max(c["tp"] for c in found["candidates"]) == 8
    assert "--trace t.csv has the lengths" in kervan.fails(SMALL, "--gpu", "H200", "--trace", "t.csv", "--isl", 100)


def test_a_plot_says_where_it_is(kervan: Kervan, tmp_path: Path) -> None:
    path = tmp_path / "plot.html"
    code, _, err = kervan.run(SMALL, "--gpu", "H200", "--gpus", 1, "--concurrency", 2, "--osl", 16, "--plot", path)
    assert (code, err) == (0, f"plot: {path}\n")
    assert "llama3-8b on 1 x H200" in path.read_text()


def test_ranks_that_share_experts_start_with_vllm_serve(kervan: Kervan) -> None:
    words = (MODELS / "qwen3-30b-a3b", "--gpu", "H200", "--gpus", 8, "--layout", "attention_dp=4", "--osl", 16)
    found = kervan.json(*words, "--concurrency", 8)
    [row] = found["candidates"]
    assert (row["attention_dp"], row["ep"], row["gpus"], row["starts_with"]) == (4, 4, 4, "vllm serve")
    assert found["launch"]["starts_with"] == "vllm serve"
    assert found["launch"]["command"].startswith(
        f"vllm serve {words[0]} --data-parallel-size 4 --enable-expert-parallel --max-model-len 8192 "
    )
    code, out, _ = kervan.run(*words, "--concurrency", 8, "--explain")
    assert code == 0
    assert "ADP4xEP4 (vllm serve)" in out
    assert "kervan up does not start data-parallel attention" in out
    assert re.search(r"^exchange  ", out, re.M)


def test_the_plan_is_one_that_kervan_up_starts(kervan: Kervan) -> None:
    """A better layout that it does not start is in the table, marked, and in the line of expert parallelism."""
    words = (MODELS / "deepseek-v3", "--gpu", "H200", "--gpus", 8, "--concurrency", 256, "--osl", 64)
    found = kervan.json(*words)
    rows = {row["starts_with"]: row["out_tok_s"] for row in reversed(found["candidates"]) if row["fits"]}
    assert found["candidates"][found["best"]]["starts_with"] == found["launch"]["starts_with"] == "kervan up"
    assert rows["vllm serve"] > rows["kervan up"]
    assert found["launch"]["command"].startswith("kervan up ")
    assert "--data-parallel-size 8 --enable-expert-parallel" in found["strategies"][3]["reason"]
    assert "ADP8xEP8 (vllm serve)" in kervan.run(*words)[1]


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (("--gpu", "H2000"), "did you mean H200"),
        (("--gpu", "H200", "--gpus", 7, "--nodes", 2), "multiple of --nodes"),
        (("--gpu", "H200", "--layout", "tp=3"), "use 1, 2, 4, 8, 16 or 32"),
        (("--gpu", "H200", "--layout", "tp=x"), "write for example tp=2,pp=2"),
        (("--gpu", "H200", "--rate", "0/s"), "write for example --rate 5/s"),
        (("--gpu", "H200", "--rate", "5/s", "--concurrency", 3), "give one of them"),
        (("--gpu", "H200", "--engine-arg", "foo"), "key=value"),
        (("--gpu", "H200", "--engine-arg", "max_num_seqs=abc"), "is not a number"),
        (("--gpu", "H200", "--engine-arg", "tensor-parallel-size=2"), "use --layout"),
        (("--gpu", "H200", "--engine-arg", "tp=2"), "use --layout"),
        (
            ("--gpu", "H200", "--engine-arg", "data_parallel_size=8"),
            "attention_dp=8 for ranks that share experts, or dp=8",
        ),
        (("--gpu", "H200", "--layout", "attention_dp=8"), "the model has none; use dp=8"),
        (("--gpu", "H200", "--engine-arg", "nnodes=2"), "kervan places the workers"),
        (("--gpu", "H200", "--engine-arg", "max_modle_len=100"), "did you mean max_model_len"),
        (("--gpu", "H200", "--engine-arg", "enforce-eager=true"), "does not count it"),
        (("--gpu", "H200", "--prefix-hit", "0.5", "--engine-arg", "enable_prefix_caching=false"), "leave one of both"),
        (("--gpu", "H200", "--price", "abc"), "--price 3.40/h"),
        (("--gpu", "H200", "--isl", "9000"), "shorter --isl"),
        (("--gpu", "H200", "--slo", "foo"), "ttft=1s,tpot=50ms"),
        (("--gpu", "H200", "--network", "nan"), "--network 400"),
        (("--gpu", "H200", "--trace", "/nowhere.csv"), "/nowhere.csv does not exist; check the path"),
        (("--gpu", "H200", "--slo", "ttft=2s,tpot=50"), "write tpot=50ms or tpot=50s"),
        (("--gpu", "H200", "--prefix-hit", "60"), "write for example --prefix-hit 0.6"),
        (("--gpu", "H200", "--prefix-hit", "nan"), "write for example --prefix-hit 0.6"),
        ((), "--gpu H200"),
    ],
)
def test_options_that_make_no_sense(kervan: Kervan, words: tuple[object, ...], fix: str) -> None:
    assert fix in kervan.fails(SMALL, *words)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{}", '{"a": 1\0}', '{"architectures": ["X"], "model_type": "x"}',
     json.dumps(config("llama3-8b") | {"num_attention_heads": 0}),
     json.dumps(config("llama3-8b") | {"hidden_size": -4}), json.dumps(config("llama3-8b") | {"vocab_size": 10**40})],
)  # fmt: skip
def test_configs_that_make_no_sense(kervan: Kervan, tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert "config.json" in kervan.fails(tmp_path, "--gpu", "H200")


def test_a_hugging_face_id(kervan: Kervan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = ("meta-llama/Llama-3-8B", "--gpu", "H200", "--gpus", 1, "--concurrency", 2, "--osl", 8)
    assert "fetch its config.json into a directory" in kervan.fails(*words)
    repository = tmp_path / "models--meta-llama--Llama-3-8B"
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    shutil.copy(Path(SMALL) / "config.json", repository / "snapshots" / "abc")
    assert kervan.json(*words)["launch"]["command"].startswith("kervan up meta-llama/Llama-3-8B --tp 1")


def test_weights_in_fp8_count(kervan: Kervan) -> None:
    words = (SMALL, "--gpu", "H200", "--gpus", 1, "--concurrency", 2, "--osl", 8)
    whole = kervan.json(*words)["candidates"][0]
    found = kervan.json(*words, "--engine-arg", "quantization=fp8", "--engine-arg", "enable_prefix_caching=true")
    half = found["candidates"][0]
    assert half["weights_gib_per_gpu"] < 0.6 * whole["weights_gib_per_gpu"]
    assert half["out_tok_s"] > whole["out_tok_s"]
    assert "--engine-arg quantization=fp8 --engine-arg enable_prefix_caching=true" in found["launch"]["command"]


def test_the_last_line_is_one_that_starts_or_says_what_is_missing(kervan: Kervan, tmp_path: Path) -> None:
    shutil.copy(Path(SMALL) / "config.json", tmp_path)
    words = ("--gpu", "H200", "--gpus", 1, "--concurrency", 2, "--osl", 8)
    for model in (tmp_path, tmp_path / "config.json"):  # kervan up takes the directory
        code, out, _ = kervan.run(model, *words)
        assert code == 0
        missing, command = out.splitlines()[-2:]
        assert command.startswith(f"kervan up {tmp_path} --tp 1")
        assert missing == weight_files.missing_weights(str(tmp_path))
    dummy = ("--engine-arg", "load_format=dummy")
    assert "no weights" not in kervan.run(tmp_path, *words, *dummy)[1]
    assert kervan.json(tmp_path, *words, *dummy)["launch"]["missing"] is None
    (tmp_path / "model.safetensors").touch()
    assert "no weights" not in kervan.run(tmp_path, *words)[1]
