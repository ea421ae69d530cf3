#!/usr/bin/env bash
# kervan bench on a fleet on 1x H200: 8B shape (benchmarks/models/llama3-8b), random weights, 1024 in / 128 out.
# A sweep of 1 to 256 streams, then the highest rate within an SLO. Under 10 minutes; records, tables and, where plotly
# is installed, a report in ${OUT:-out}.
# Without a .git folder, set KERVAN_COMMIT for the records.
set -euo pipefail
cd "$(dirname "$0")/.."

out=${OUT:-out}
mkdir -p "$out"
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 VLLM_NO_USAGE_STATS=1 RAY_USAGE_STATS_ENABLED=0 PYTHONUNBUFFERED=1
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"

folder=$(mktemp -d)
model=$folder/llama3-8b
trap 'python3 -m kervan down --name bench >/dev/null 2>&1 || true; rm -rf "$folder"' EXIT
python3 benchmarks/shape_model.py benchmarks/models/llama3-8b/config.json "$model"
python3 -m kervan up "$model" --name bench --port 8000 --gateways 2 --detach \
  --engine-arg load_format=dummy --engine-arg max_model_len=8192 --engine-arg enable_prefix_caching=false

bench() { timeout "$1" python3 -m kervan bench http://127.0.0.1:8000 --isl 1024 --osl 128 --record "$out" "${@:2}"; }
report=()
if python3 -c 'import plotly' 2>/dev/null; then report=(--html "$out/report.html"); fi
{
  bench 200 --streams 1,16,64,256 --duration 15s --slo ttft=2s,tpot=50ms "${report[@]}"
  bench 240 --find-rate --rate 8 --slo ttft=2s,tpot=50ms --trial-time 24s
} 2>&1 | tee "$out/bench.txt"
