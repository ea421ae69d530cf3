#!/usr/bin/env bash
# All steps of README.md with one call: start, chat, load test, autoscaling, dashboards, stop.
#
#   bash try.sh OUT [kervan up's arguments]           on GPUs
#   bash try.sh OUT ../../benchmarks/models/llama3-70b --engine twin --gpu H200     simulated, on a laptop
#
# STREAMS, RATES and SECONDS_EACH shorten the load test; KERVAN and PYTHON name the programs.
set -euo pipefail
out=$1
shift
here=$(cd "$(dirname "$0")" && pwd)
kervan=${KERVAN:-kervan} python=${PYTHON:-python3}
name=llama3-70b
mkdir -p "$out"

$kervan up "$@" --config "$here/fleet.yaml" --name "$name" --detach --json >"$out/up.json"
trap '$kervan down --name "$name"' EXIT
url=$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["url"])' "$out/up.json")

"$python" "$here/chat.py" "$url"

# Closed loops, then requests at a rate: P50, P95, P99 of TTFT and of the time per token, as tables, JSON and one HTML file.
$kervan bench "$url" --streams "${STREAMS:-1,16,64,256}" --duration "${SECONDS_EACH:-60}s" --isl 1024 --osl 256 \
  --html "$out/streams.html" --record "$out/streams.json"
$kervan bench "$url" --rate "${RATES:-2,6,10,14}" --duration "${SECONDS_EACH:-60}s" --isl 1024 --osl 256 \
  --slo ttft=2s,tpot=50ms --html "$out/rates.html" --record "$out/rates.json"

$kervan observe render "$out/monitoring" --name "$name"
$kervan scale 1..4 --name "$name"
$kervan autoscale --name "$name"
$kervan status --name "$name"
