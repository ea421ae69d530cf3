#!/usr/bin/env bash
# What Linux's autogroups cost on busy cores: bash benchmarks/autogroups.sh MODEL_DIR, as root, in about 7 minutes.
# Two vLLM CPU replicas, 32 streams for ${FOR:-45s}: with autogroups, without, without, with. Records go to ${OUT:-out}.
# A process is in the group of its session from its start, so each run has a fleet of its own.
set -euo pipefail
cd "$(dirname "$0")/.."

model=$1 out=${OUT:-out} port=${PORT:-18434} switch=/proc/sys/kernel/sched_autogroup_enabled
mkdir -p "$out"
KERVAN_HOME=$(mktemp -d)
export KERVAN_HOME PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
before=$(cat $switch)
trap 'python3 -m kervan down --name groups >/dev/null 2>&1 || true; rm -rf "$KERVAN_HOME"; echo "$before" >$switch' EXIT

for run in on-1 off-1 off-2 on-2; do
  case $run in on-*) echo 1 >$switch ;; off-*) echo 0 >$switch ;; esac
  python3 -m kervan up "$model" --name groups --port "$port" --replicas 2 --gateways 2 --detach \
    --engine-arg dtype=float32 --engine-arg enforce_eager=true --engine-arg max_model_len=2048 \
    --env VLLM_CPU_KVCACHE_SPACE=1 --env VLLM_CPU_OMP_THREADS_BIND=nobind --env OMP_NUM_THREADS=1
  # Another session than the fleet's, as a client's would be.
  setsid --wait python3 -m kervan bench "http://127.0.0.1:$port" --streams 32 --isl 16 --osl 600 --duration "${FOR:-45s}" \
    --no-calibration --record "$out/autogroups-$run.json" | tee "$out/autogroups-$run.txt"
  python3 -m kervan down --name groups
done
grep -H "^stalls" "$out"/autogroups-*.txt
