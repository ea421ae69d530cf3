"""A fleet in a Slurm job: a batch script that starts Ray on all nodes of the job, then the fleet, and ends in order."""

import shlex

from kervan.cluster.fleet_file import for_cluster, settings
from kervan.cluster.request import RenderRequest
from kervan.cluster.text import as_yaml, made_by
from kervan.errors import ConfigError
from kervan.facts.markets import SPOT

STOP_S = 30  # for Ray to end on all nodes, after the fleet
BATCH_FILE = "kervan.sbatch"


def files(request: RenderRequest) -> dict[str, str]:
    """The script, and the fleet's file beside it.

    Raises: ConfigError for spot nodes, which Slurm does not have.
    """
    if any(group.market == SPOT for group in request.groups):
        raise ConfigError(
            "--target slurm: a job's nodes are all of one market, and the fleet has a spot pool; write "
            f"--replicas {sum(bounds.maximum for bounds in request.fleet.bounds.values())} in place of --pool"
        )
    fleet = for_cluster(request.fleet, gpus_per_node=request.machine.gpus, nodes=request.most_nodes)
    return {BATCH_FILE: script(request), "fleet.yaml": as_yaml(request.target, settings(fleet))}


def script(request: RenderRequest) -> str:
    """The batch script. What is known of the request is in its first lines; the rest is the same for all."""
    machine = request.machine
    stop_s = round(request.fleet.drain_timeout_s) + STOP_S
    days, minutes = divmod(request.time_limit_min, 24 * 60)
    options = {
        "job-name": f"kervan-{request.name}",
        "nodes": request.most_nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": machine.cpus,
        "mem": f"{machine.memory_gib}G",
        **({"gpus-per-node": machine.gpus} if machine.gpus else {}),
        **({"partition": request.partition} if request.partition else {}),
        "time": f"{days}-{minutes // 60:02}:{minutes % 60:02}:00",
        # To this script alone, so long before the end that the fleet's streams can.
        "signal": f"B:TERM@{stop_s + STOP_S}",
        "output": "kervan-%j.log",
    }
    variables = {
        "fleet": request.name,
        "gpus": machine.gpus,
        "cpus": machine.cpus,
        "stop_s": stop_s,
    }
    return (
        "#!/usr/bin/env bash\n"
        + "".join(f"#SBATCH --{name}={shlex.quote(str(value))}\n" for name, value in options.items())
        + made_by(request.target)
        + "\n"
        + "".join(f"{name}={shlex.quote(str(value))}\n" for name, value in variables.items())
        + BODY
    )


BODY = r"""
set -euo pipefail
# The directory from which the job was submitted has fleet.yaml; kervan, ray and python are those of PATH.
config="$SLURM_SUBMIT_DIR/fleet.yaml"
[[ -r $config ]] || { echo "error: $config is not there; submit from the directory that has it" >&2; exit 2; }
: "${KERVAN_API_KEY:?error: set KERVAN_API_KEY before sbatch: the port is open to the cluster}"

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${hosts[0]}
port=$((20000 + SLURM_JOB_ID % 20000))
on_head=(srun --overlap --nodes=1 --ntasks=1 "--nodelist=$head")
address=$("${on_head[@]}" hostname --ip-address | awk '{print $1; exit}'):$port

# Other users of these nodes must not join, or be joined.
RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')
RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=10
KERVAN_HOME=${KERVAN_HOME:-$HOME/.kervan/slurm-$SLURM_JOB_ID}
KERVAN_NOTICES_WATCH=${KERVAN_NOTICES_WATCH:-signal}
export RAY_AUTH_MODE RAY_AUTH_TOKEN RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S KERVAN_HOME KERVAN_NOTICES_WATCH

ray_pids=() fleet_pid=
stop() {
  trap '' TERM INT
  if [[ -n $fleet_pid ]] && kill -TERM "$fleet_pid" 2>/dev/null; then  # kervan up ends its fleet
    timeout "$stop_s" tail --pid="$fleet_pid" -f /dev/null || true
  fi
  for ((place = ${#ray_pids[@]} - 1; place >= 0; place--)); do  # the head, which was first, is last
    kill -TERM "${ray_pids[place]}" 2>/dev/null || true
    timeout 30 tail --pid="${ray_pids[place]}" -f /dev/null || true
  done
}
trap stop EXIT
trap 'exit 143' TERM INT

temp_dir=/tmp/kervan-ray-$SLURM_JOB_ID
"${on_head[@]}" ray start --head --block "--node-ip-address=${address%:*}" "--port=$port" "--temp-dir=$temp_dir" \
  "--num-cpus=$cpus" "--num-gpus=$gpus" --include-dashboard=false &
ray_pids+=($!)
for ((tries = 0; ; tries++)); do
  "${on_head[@]}" ray health-check --address "$address" 2>/dev/null && break
  ((tries < 60)) || { echo "error: Ray's head did not start at $address" >&2; exit 1; }
  sleep 2 & wait $!
done
if ((${#hosts[@]} > 1)); then
  srun --overlap "--nodes=$((${#hosts[@]} - 1))" "--ntasks=$((${#hosts[@]} - 1))" "--exclude=$head" \
    ray start --block "--address=$address" "--num-cpus=$cpus" "--num-gpus=$gpus" &
  ray_pids+=($!)
fi
nodes="import ray; ray.init(address='$address', log_to_driver=False); print(sum(n['Alive'] for n in ray.nodes()))"
for ((tries = 0; ; tries++)); do
  joined=$("${on_head[@]}" python -c "$nodes" 2>/dev/null | tail -n 1 || true)
  [[ $joined == "${#hosts[@]}" ]] && break
  ((tries < 60)) || { echo "error: ${joined:-0} of ${#hosts[@]} nodes joined Ray" >&2; exit 1; }
  sleep 5 & wait $!
done

"${on_head[@]}" kervan up --config "$config" --name "$fleet" --address "$address" &
fleet_pid=$!
wait "$fleet_pid"
"""
