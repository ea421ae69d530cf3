#!/usr/bin/env bash
# Overhead on 1x H200: 8B shape (benchmarks/models/llama3-8b), random weights, 1024 in / 256 out. Under 10 minutes.
#   bash benchmarks/h200_overhead.sh         kervan against bare vLLM, at 1, 64 and 256 streams
#   bash benchmarks/h200_overhead.sh naive   kervan against naive_service.py, at 64 streams
# Logs, table and record go to ${OUT:-out}. Without a .git folder, set KERVAN_COMMIT for the record.
# Further arguments go to overhead.py (--gateways 2, --ingress serve, ...).
#
# Two engines share the GPU, one loaded at a time:
#   weights      8.03e9 parameters x 2 B                                            = 15.0 GiB
#   KV cache     256 streams x (1024 + 256) tokens x 128 KiB                        = 40.0 GiB; 42 asked for
#                (2 x 32 layers x 8 KV heads x 128 x 2 B = 128 KiB per token)
#   the rest     activations of 8192 tokens, CUDA graphs, CUDA context             ~   5 GiB
#   both         2 x 62 GiB = 124 of the 140.4 GiB (143,771 MiB) of an H200
# The KV cache is given in bytes: both sides get the same number of blocks, and two engines may start at once (vLLM's
# own sizing takes another process's allocations for its own). gpu_memory_utilization is then only the check at start
# that this much is still free: 0.42 x 140.4 = 59 GiB, with the other engine's 62 taken.
set -euo pipefail
cd "$(dirname "$0")/.."

out=${OUT:-out}
part=overhead
if [[ ${1:-} == naive ]]; then part=naive; shift; fi
mkdir -p "$out"

# NVLink multicast is for several GPUs and can wedge a host that others share.
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 VLLM_NO_USAGE_STATS=1 RAY_USAGE_STATS_ENABLED=0 PYTHONUNBUFFERED=1

model=$(mktemp -d)/llama3-8b
trap 'rm -rf "$(dirname "$model")"' EXIT
python3 benchmarks/shape_model.py benchmarks/models/llama3-8b/config.json "$model"

case $part in
  overhead) runs=(--concurrency 1,64,256 --requests-per-stream 8,3,2 --pairs 5) ;;
  # One request per stream takes the naive service 64 x 256 / 195 tok/s = 84 s.
  naive) runs=(--concurrency 64 --requests-per-stream 3 --against naive --naive-pairs 2) ;;
esac

# 600 s in all: start 90-150 s, pairs until 500 s, stop 10-30 s; a hard stop in time to still clean up.
timeout 560 python3 benchmarks/overhead.py --model "$model" "${runs[@]}" --isl 1024 --osl 256 \
  --engine-arg load_format=dummy --engine-arg max_model_len=8192 --engine-arg enable_prefix_caching=false \
  --engine-arg gpu_memory_utilization=0.42 --engine-arg kv_cache_memory_bytes=$((42 * 1024 ** 3)) \
  --deadline-s 500 --log-dir "$out" --record-dir "$out" "$@" 2>&1 | tee "$out/$part.txt"
