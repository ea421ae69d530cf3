#!/usr/bin/env bash
# What a move does to streams, on 2x H100: bash benchmarks/h100_moves.sh engines|storm
#   engines   exact on the first GPU beside flips on the second, then tp on both; under 8 minutes
#   storm     8B shape, 2 replicas, 64 streams of 1,024 tokens in and about 512 out: a kill, then a drain; under 8 minutes
# or one part alone: exact, flips (1 GPU each), tp. Logs and records go to ${OUT:-out}; LIMIT_S shortens each part.
# Without a .git folder, set KERVAN_COMMIT for the records.
set -euo pipefail
cd "$(dirname "$0")/.."

part=${1:?engines, storm, exact, flips or tp}
shift
out=${OUT:-out}
mkdir -p "$out"
# NVLink multicast can wedge a host that others share.
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 VLLM_NO_USAGE_STATS=1 RAY_USAGE_STATS_ENABLED=0 PYTHONUNBUFFERED=1
export VLLM_USE_FLASHINFER_SAMPLER=0 TOKENIZERS_PARALLELISM=true
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"

moves() { # part, limit in seconds, further arguments
  timeout $(($2 + 30)) python3 benchmarks/gpu_moves.py "$1" --out "$out" --limit-s "$2" "${@:3}" \
    >"$out/$1.txt" 2>&1 || echo "$1 ended with $?"
  grep -v '^{' "$out/$1.txt" | tail -n 150 || true
}

case $part in
  engines)
    CUDA_VISIBLE_DEVICES=0 moves exact "${LIMIT_S:-300}" "$@" >"$out/exact.table" &
    CUDA_VISIBLE_DEVICES=1 moves flips "${LIMIT_S:-300}" "$@" >"$out/flips.table" &
    wait
    moves tp "${LIMIT_S:-180}" "$@"
    cat "$out/exact.table" "$out/flips.table"
    ;;
  exact | flips) CUDA_VISIBLE_DEVICES=${GPU:-0} moves "$part" "${LIMIT_S:-300}" "$@" ;;
  tp) moves tp "${LIMIT_S:-180}" "$@" ;;
  storm) moves storm "${LIMIT_S:-460}" "$@" ;;
  *) echo "$part is none of engines, storm, exact, flips, tp" >&2; exit 2 ;;
esac
