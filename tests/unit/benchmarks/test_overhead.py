"""How the overhead benchmark pairs, sums and prints runs, and how it writes vLLM's flags. No server is started."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import overhead
import psutil
import pytest
import servers
from harness.places import BENCHMARKS


def run(side: str, pair: int, rate: float, ttft: float, *, errors: int = 0, against: str = "bare") -> dict[str, Any]:
    usage = {"cpu_s": 0.1, "rss_bytes": 2**20 * (pair + 1), "uss_bytes": None}
    result = {
        "out_tok_s": rate,
        "ttft_p50_s": ttft,
        "errors": {"truncated": errors} if errors else {},
        "output_tokens": 1000,
        **dict.fromkeys(("ttft_p99_s", "tpot_p50_s", "tpot_p99_s", "longest_gap_s", "tokens_per_chunk"), 0.01),
    }
    meters = {"front": [usage, usage], "engine": [usage], "control": usage}
    return {"side": side, "load": result, "usage": meters, "against": against, "pair": pair, "concurrency": 64}


RUNS = [
    *(run("bare", 0, 100.0, 0.010), run("kervan", 0, 98.0, 0.012)),
    *(run("kervan", 1, 110.0, 0.011), run("bare", 1, 100.0, 0.010)),
    *(run("bare", 2, 100.0, 0.010), run("kervan", 2, 50.0, 0.010, errors=1)),
    run("bare", 3, 100.0, 0.010),  # its other half was never run
]


def test_ratios_are_per_pair_and_pairs_with_errors_are_left_out() -> None:
    [row] = overhead.summarize(RUNS)
    assert row["ratios"] == pytest.approx([0.98, 1.10])
    assert (row["pairs"], row["pairs_with_errors"]) == (2, 1)
    assert (row["ratio_median"], row["ratio_min"], row["ratio_max"]) == pytest.approx((1.04, 0.98, 1.10))
    assert row["added_ttft_p50_median_s"] == pytest.approx(0.0015)  # of 2 ms and 1 ms


def test_cpu_is_per_token_over_all_fronts_and_memory_is_per_process() -> None:
    kervan = overhead.summarize(RUNS)[0]["kervan"]
    # Two gateways of 0.1 s over 1000 tokens: 200 us; one replica: 100 us.
    assert kervan["cpu_us_per_token"] == pytest.approx({"front": 200.0, "engine": 100.0, "control": 100.0})
    assert kervan["front_memory"] == [{"rss_bytes": 2 * 2**20, "uss_bytes": None}] * 2  # the larger of pairs 0 and 1


def test_table_of_a_record_read_back_names_every_opponent() -> None:
    runs = [*RUNS, run("naive", 0, 4.0, 1.0, against="naive"), run("kervan", 0, 100.0, 0.01, against="naive")]
    record = {
        "date": "2026-01-01T00:00:00+00:00",
        "hardware": {"cpu": "x", "cores": 2, "gpu": ""},
        "versions": {"python": "3.11"},
        "command": "python benchmarks/overhead.py",
        "settings": {"isl": 64, "osl": 64},
        "summary": overhead.summarize(runs),
        "ended": None,
    }
    text = overhead.table(json.loads(json.dumps(record)))
    assert "1.040  [0.980 1.100]" in text
    assert "25.000" in text  # kervan over naive
    assert "2 (+1 failed)" in text


@pytest.mark.parametrize(
    ("gpu", "slug"),
    [("", "cpu-2core"), ("NVIDIA H200, 143771 MiB, 580.1", "1xh200")],
)
def test_record_names(gpu: str, slug: str, tmp_path: Path) -> None:
    facts = {"cpu": "x", "cores": 2, "gpu": gpu, "num_gpus": int(bool(gpu))}
    record = {"what": "overhead", "date": "2026-01-01T00:00:00+00:00", "hardware": facts}
    first = overhead.record_path(record, tmp_path)
    assert first.name == f"overhead-{slug}-2026-01-01.json"
    first.touch()
    assert overhead.record_path(record, tmp_path).name == f"overhead-{slug}-2026-01-01-2.json"


def test_engine_args_keep_vllm_names_and_become_its_flags() -> None:
    engine_args = servers.parse_engine_args(
        ["max-model-len=8192", "enforce_eager=true", "enable_prefix_caching=false", "dtype=float32", 'o={"a":1}']
    )
    assert engine_args["max_model_len"] == 8192
    assert servers.vllm_flags(engine_args) == [
        *("--max-model-len", "8192", "--enforce-eager", "--no-enable-prefix-caching", "--dtype", "float32"),
        *("--o", '{"a": 1}'),
    ]


def test_assignment_without_equals_sign_is_refused() -> None:
    with pytest.raises(ValueError, match="write key=value"):
        servers.parse_assignments(["max_model_len"])


SLEEPERS = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'input()'], stdin=-1).wait()"


def test_server_that_exits_gives_the_end_of_its_log_and_leaves_nothing(tmp_path: Path) -> None:
    def connect(starting: servers.Starting) -> servers.Server:
        starting.process.wait()
        raise starting.fail("exited")

    command = [sys.executable, "-c", "print('out of memory')"]
    start = servers._subprocess("x", command, log_dir=tmp_path, env={}, timeout_s=5, connect=connect)
    with pytest.raises(servers.ServerError, match="out of memory"), start as starting:
        starting.wait()


def test_stopping_ends_the_children_too(tmp_path: Path) -> None:
    def connect(starting: servers.Starting) -> servers.Server:
        pid = starting.process.pid
        while not (children := psutil.Process(pid).children()):
            assert starting.process.poll() is None
        return servers.Server("x", "", "", (pid,), tuple(c.pid for c in children))

    command = [sys.executable, "-c", SLEEPERS]
    with servers._subprocess("x", command, log_dir=tmp_path, env={}, timeout_s=5, connect=connect) as starting:
        server = starting.wait()
        usage = servers.Meter(server).read()
        assert usage.front[0].rss_bytes > 0
        assert usage.engine[0].rss_bytes > 0  # the child is counted under its own root, not its parent's
    assert not any(psutil.pid_exists(pid) for pid in (*server.front, *server.engine))


def test_shape_model_covers_the_vocabulary(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"vocab_size": 2000, "bos_token_id": 0, "eos_token_id": 1}))
    subprocess.run([sys.executable, BENCHMARKS / "shape_model.py", config, tmp_path / "out"], check=True)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 2000
    assert all(tokenizer.decode([i]) for i in range(2, 2000))
    assert tokenizer.decode(tokenizer.encode("some text, \u00e9").ids) == "some text, \u00e9"
