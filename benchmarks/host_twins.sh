#!/usr/bin/env bash
# What gateways cost and how they scale, with simulated engines: 16 twins of the 8B shape, up to 1,024 streams, on 1, 2
# and 4 gateways. For a host with 16 cores or more; no GPU computes. Under 300 s; table, record and logs in ${OUT:-out}.
# Without a .git folder, set KERVAN_COMMIT for the record. Further arguments go to twins.py (--streams 512, ...).
set -euo pipefail
cd "$(dirname "$0")/.."

out=${OUT:-out}
mkdir -p "$out"
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 VLLM_NO_USAGE_STATS=1 RAY_USAGE_STATS_ENABLED=0 PYTHONUNBUFFERED=1

model=$(mktemp -d)/llama3-8b
trap 'rm -rf "$(dirname "$model")"' EXIT
python3 benchmarks/shape_model.py benchmarks/models/llama3-8b/config.json "$model"
timeout --kill-after=30 300 python3 benchmarks/twins.py scaling --deadline 270 --model "$model" --record "$out" --logs "$out/logs" "$@" 2>&1 |
  tee "$out/twins.txt"
