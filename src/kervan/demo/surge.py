"""What `kervan demo autoscale` serves and sends: a fleet of twins, and a load that rises and falls."""

import json
from pathlib import Path
from typing import Any

# The shape of an 8B model; twins need no weights.
SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
MOST = 6
# A step of 25 ms and 8 sequences at once: 80 tokens take 2 s, and a replica 4 requests/s.
SETTINGS: dict[str, Any] = {
    "engine": "twin",
    "gpu": "H200",
    "replicas": f"1..{MOST}",
    "twin": {"base_s": 0.025, "max_num_seqs": 8, "start_s": 3},
    "engine_args": {"max_model_len": 2048, "served_model_name": "twin"},
    "autoscaling": {"downscale_delay_s": 6},
}
STAGES = "1@8s,1..12@6s,12@30s,1@30s"
PROMPT_TOKENS, OUTPUT_TOKENS = 128, 80


def write(directory: Path) -> tuple[Path, Path]:
    """The model's directory and the fleet's settings, written into `directory`."""
    model, settings = directory / "llama-8b-shape", directory / "fleet.yaml"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(SHAPE))
    settings.write_text(json.dumps(SETTINGS))
    return model, settings


def line(status: dict[str, Any]) -> str:
    """One line of what a gateway's status page tells: load, streams, replicas."""
    scaling = status["directory"]["scaling"] or {"targets": {}, "numbers": {}}
    states = [replica["state"] for replica in status["directory"]["replicas"]]
    bar = "#" * states.count("ready") + "+" * states.count("starting") + "-" * states.count("draining")
    load = scaling["numbers"].get("load_requests_per_s", 0.0)  # the policy's, of about the last minute
    target = sum(scaling["targets"].values())
    return (
        f"{load:5.1f} requests/s  {status['streams']:3} streams, {status['held']:3} held  "
        f"[{bar:<{MOST}}] {states.count('ready')} ready, {target} wanted"
    )


def changes(status: dict[str, Any]) -> list[tuple[float, str]]:
    """(Unix time, what changed and why) of the decisions that a gateway's status page tells."""
    scaling = status["directory"]["scaling"] or {"history": []}
    return [
        (entry["at_s"], f"{sum(entry['before'].values())} -> {sum(entry['targets'].values())}: {entry['reason']}")
        for entry in scaling["history"]
    ]
