"""The environment of the processes that a fleet's actors start."""

import logging
import os
from pathlib import Path

from kervan import logs
from kervan.config.fleet import FleetConfig

logger = logging.getLogger(__name__)

VLLM_JSON_LOGS = Path(__file__).parents[1] / "fleet/vllm/json_logs.json"  # how vLLM is to log
WARM_OWNER = "KERVAN_WARM_OWNER_PID"


def warm_owner_pid() -> int:
    """The process with which the node's warm process ends: this actor's raylet, which outlives actors.

    Or the one that the environment names: then Ray clusters that start one after the other find it ready.
    """
    given = os.environ.get(WARM_OWNER, "")
    if given and not given.isdecimal():
        logger.warning("%s=%r is not the number of a process; the warm process ends with Ray", WARM_OWNER, given)
    return int(given) if given.isdecimal() else os.getppid()


def process_environment(config: FleetConfig, *, is_on_cpu: bool) -> dict[str, str]:
    """The whole environment of an engine or gateway: this actor's, less what Ray set for its own, and the user's.

    One for both, as what differs makes another process from which they are forked (`kervan.fleet.warm_start`).
    """
    env = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    if env.get("CUDA_VISIBLE_DEVICES") == "":  # Ray's way to say that this actor itself has no GPU
        del env["CUDA_VISIBLE_DEVICES"]
    env.setdefault("VLLM_NO_USAGE_STATS", "1")
    if is_on_cpu and config.engine_args.get("enforce_eager") is True:
        # vLLM 0.24 to 0.32 compile how log probabilities are ranked all the same, at the first request that wants some.
        # All streams of the replica would stand still meanwhile: 19 s on two cores, 2 s with a filled cache (by hand).
        env.setdefault("TORCH_COMPILE_DISABLE", "1")
    if config.log_format == "json":
        env[logs.VARIABLE] = "json"
        env.setdefault("VLLM_LOGGING_CONFIG_PATH", str(VLLM_JSON_LOGS))
    if config.otlp:  # vLLM speaks gRPC unless it is told
        env.setdefault("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
        env.setdefault("OTEL_SERVICE_NAME", "vllm")  # kervan's own spans say that they are kervan's
    return {**env, **config.env}
