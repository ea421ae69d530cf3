#!/usr/bin/env bash
# kervan chaos on CPU: bash benchmarks/chaos.sh MODEL_DIR kills|drains|vllm. Records and words go to ${OUT:-out}.
#   kills   4 twins, 64 streams, a kill every 10 s for ${FOR:-5min}
#   drains  4 twins, 64 streams, a drain every ${EVERY:-6s} for ${FOR:-21min}: 209, less those skipped
#   vllm    3 vLLM CPU engines, 8 streams, a kill every 40 s for ${FOR:-5min}: an engine takes about that long to start
set -euo pipefail
cd "$(dirname "$0")/.."

model=$1 what=$2 out=${OUT:-out} port=${PORT:-18433}
mkdir -p "$out"
KERVAN_HOME=$(mktemp -d)
export KERVAN_HOME PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
trap 'python3 -m kervan down --name chaos >/dev/null 2>&1 || true; rm -rf "$KERVAN_HOME"' EXIT

twins=(--engine twin --gpu H200 --twin base_s=0.03 --replicas 4)
vllm=(--replicas 3 --engine-arg dtype=float32 --engine-arg enforce_eager=true --env VLLM_CPU_KVCACHE_SPACE=1
  --env VLLM_CPU_OMP_THREADS_BIND=nobind --env OMP_NUM_THREADS=1)
case $what in
  kills) fleet=("${twins[@]}") words=(--kill-every 10s --for "${FOR:-5min}" --streams 64) ;;
  drains) fleet=("${twins[@]}") words=(--drain-every "${EVERY:-6s}" --for "${FOR:-21min}" --streams 64) ;;
  vllm) fleet=("${vllm[@]}") words=(--kill-every 40s --for "${FOR:-5min}" --streams 8) ;;
  *) echo "$what is none of kills, drains, vllm" >&2; exit 2 ;;
esac
python3 -m kervan up "$model" --name chaos --port "$port" --gateways 1 --engine-arg max_model_len=2048 --detach "${fleet[@]}"
python3 -m kervan chaos "http://127.0.0.1:$port" "${words[@]}" --record "$out" 2>&1 | tee "$out/chaos-$what.txt"
