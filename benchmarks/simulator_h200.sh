#!/usr/bin/env bash
# One H200: vLLM on an 8B shape with random weights at three loads, and the same requests in the simulator; under 10 minutes.
# The record is written to ${OUT:-out}. Without a .git folder, set KERVAN_COMMIT for the record.
set -euo pipefail
cd "$(dirname "$0")/.."

out=${OUT:-out}
mkdir -p "$out"
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 VLLM_NO_USAGE_STATS=1 RAY_USAGE_STATS_ENABLED=0 PYTHONUNBUFFERED=1
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"

folder=$(mktemp -d)
model=$folder/llama3-8b
trap 'rm -rf "$folder"' EXIT
python3 benchmarks/shape_model.py benchmarks/models/llama3-8b/config.json "$model"
timeout 580 python3 benchmarks/simulator_validation.py --engine vllm --model "$model" --gpu H200 --replicas 1 --budget 0 \
  --isl 512..1536 --osl 64..448 --slo ttft=1s,tpot=30ms --accepted 0.15 \
  --ramp 4:70s --ramp 10:70s --ramp 16:70s --record "$out" 2>&1 | tee "$out/simulator.txt"
