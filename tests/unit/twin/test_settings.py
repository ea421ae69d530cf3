"""What a twin pretends to be, against what vLLM did and reported on the real GPU."""

import json
from pathlib import Path
from typing import Any

import pytest

from kervan.config.fleet import FleetConfig
from kervan.errors import CapacityError, ConfigError
from kervan.twin.settings import settings
from kervan.twin.token_engine import TwinEngine, TwinRequest, TwinSettings

LLAMA3_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 8192, "eos_token_id": 1, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA3_70B = LLAMA3_8B | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                          "num_attention_heads": 64}  # fmt: skip
QWEN3_30B_A3B = LLAMA3_8B | {
    "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
    "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936,
}  # fmt: skip


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path


def fleet(directory: Path, described: dict[str, Any], **more: Any) -> FleetConfig:
    (directory / "config.json").write_text(json.dumps(described))
    return FleetConfig(**{"model": str(directory), "engine": "twin", "gpu": "H200", **more})


@pytest.mark.parametrize(
    ("described", "tp", "kv_tokens"),
    # As vLLM 0.24.0 reported on H200 SXM, gpu_memory_utilization 0.92.
    [pytest.param(LLAMA3_8B, 1, 920_192, id="8b"), pytest.param(LLAMA3_70B, 4, 1_236_112, id="70b-tp4")],
)
def test_the_kv_pool_is_near_vllms(directory: Path, described: dict[str, Any], tp: int, kv_tokens: int) -> None:
    limits = settings(fleet(directory, described, tp=tp)).limits
    assert limits.num_blocks * limits.block_size == pytest.approx(kv_tokens, rel=0.02)


def closed_loop_tok_s(found: TwinSettings, streams: int) -> float:
    """Output tokens/s of 4 requests per stream, 1,024 tokens in and 256 out."""
    twin = TwinEngine(found.timing, found.limits)
    now_s, added, tokens = 0.0, 0, 0
    while True:
        while added < 4 * streams and len(twin.clients_of(0)) < streams:
            twin.add(
                TwinRequest(id=str(added), client=0, prompt=range(added, added + 1024), max_tokens=256, ignore_eos=True)
            )
            added += 1
        step = twin.start_step()
        if step is None:
            return tokens / now_s
        now_s += step.duration_s
        tokens += len(twin.end_step(step))


@pytest.mark.parametrize(
    ("described", "tp", "streams", "tok_s", "within"),
    [
        # Bare vLLM 0.24.0 on H200 SXM, bf16, random weights, 2026-11-22.
        pytest.param(LLAMA3_8B, 1, 1, 199.75, 0.05, id="8b, 1 stream"),
        pytest.param(LLAMA3_8B, 1, 64, 4676.68, 0.10, id="8b, 64 streams"),
        pytest.param(LLAMA3_70B, 4, 1, 78.46, 0.05, id="70b, tp 4, 1 stream"),
        pytest.param(LLAMA3_70B, 4, 64, 1925.6, 0.10, id="70b, tp 4, 64 streams"),
    ],
)
def test_the_speed_is_near_vllms(
    directory: Path, described: dict[str, Any], tp: int, streams: int, tok_s: float, within: float
) -> None:
    assert closed_loop_tok_s(settings(fleet(directory, described, tp=tp)), streams) == pytest.approx(tok_s, rel=within)


def test_what_the_user_says_wins(directory: Path) -> None:
    said = {"base_s": "0.5", "num_blocks": "4096", "speed": "2", "mean_answer_tokens": "10"}
    found = settings(fleet(directory, LLAMA3_8B, twin=said, engine_args={"max_num_seqs": 7, "max_model_len": "100"}))
    assert (found.timing.base_s, found.speed) == (0.5, 2)
    limits = found.limits
    assert (limits.num_blocks, limits.max_num_seqs, limits.max_model_len, limits.mean_answer_tokens) == (
        4096,
        7,
        100,
        10,
    )


@pytest.mark.parametrize(
    ("more", "is_on"),
    [({}, True), ({"engine_args": {"enable_prefix_caching": False}}, False), ({"twin": {"enable_prefix_caching": 0}}, False)],
)  # fmt: skip
def test_the_prefix_cache_is_on_unless_it_is_turned_off(directory: Path, more: dict[str, Any], is_on: bool) -> None:
    assert settings(fleet(directory, LLAMA3_8B, **more)).limits.enable_prefix_caching is is_on


def test_tokens_are_ordinary_text(directory: Path) -> None:
    added = [{"id": i} for i in (0, 1, 2, 900, *range(128000, 128256))]
    (directory / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    limits = settings(fleet(directory, LLAMA3_8B)).limits
    assert (limits.first_token, limits.last_token, limits.eos_token) == (901, 127999, 1)


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        pytest.param({"gpu": "H2000"}, ConfigError, "did you mean H200?", id="gpu"),
        pytest.param(
            {"gpu": "L4"}, CapacityError, "use a larger --tp, or --engine-arg max_model_len=", id="kv too small"
        ),
        pytest.param({"gpu": "A10G", "described": LLAMA3_70B}, CapacityError, "use a larger --tp", id="weights"),
        pytest.param({"twin": {"base": "1"}}, ConfigError, "did you mean 'base_s'?", id="unknown setting"),
        pytest.param({"twin": {"speed": "fast"}}, ConfigError, "is not a number", id="no number"),
        pytest.param({"twin": {"speed": "0"}}, ConfigError, "out of range", id="zero speed"),
        pytest.param({"twin": {"spot_per_node": "0.5"}}, ConfigError, "not a whole number in 0..100", id="part of one"),
        pytest.param({"twin": {"spot_per_node": "101"}}, ConfigError, "not a whole number in 0..100", id="too many"),
        pytest.param({"twin": {"num_blocks": "3"}}, ConfigError, "use num_blocks=512", id="too few blocks"),
        pytest.param(
            {"engine_args": {"enable_prefix_caching": "maybe"}},
            ConfigError,
            "neither true nor false",
            id="no yes or no",
        ),
        pytest.param({"engine_args": {"max_num_seqs": "many"}}, ConfigError, "is not a number", id="engine argument"),
        pytest.param(
            {"described": {"model_type": "x", "architectures": ["y"]}}, ConfigError, "hidden_size", id="shape"
        ),
    ],
)
def test_refusals_name_the_fix(directory: Path, more: dict[str, Any], error: type[Exception], words: str) -> None:
    described = more.pop("described", LLAMA3_8B)
    if more.get("gpu") == "L4":
        more["engine_args"] = {"max_model_len": 131072}
    with pytest.raises(error, match=words.replace("?", r"\?")):
        settings(fleet(directory, described, **more))


def test_a_hub_id_cannot_be_twinned() -> None:
    with pytest.raises(ConfigError, match=r"needs its config\.json"):
        settings(FleetConfig(model="Qwen/Qwen3-8B", engine="twin", gpu="H200"))


def test_without_a_tokenizer_the_made_ones_special_tokens_are_left_out(tmp_path: Path) -> None:
    described = LLAMA3_8B | {"bos_token_id": 128_000, "eos_token_id": 128_001}
    made = settings(fleet(tmp_path, described)).limits
    assert (made.first_token, made.last_token, made.eos_token) == (0, 127_999, 128_001)
    (tmp_path / "tokenizer.json").write_text("{}")  # its own, without special tokens but the last
    own = settings(fleet(tmp_path, described)).limits
    assert (own.first_token, own.last_token, own.eos_token) == (0, 128_000, 128_001)
