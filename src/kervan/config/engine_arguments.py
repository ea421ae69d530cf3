"""The arguments of vLLM's own server: which ones kervan decides, and how they are read and written."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from kervan.errors import ConfigError

# They decide how much of a GPU's memory an engine takes.
MEMORY_ARGUMENTS = frozenset({"gpu_memory_utilization", "kv_cache_memory_bytes"})

# Engine arguments that kervan decides, and what to use in their place.
OWNED = {
    "model": "the MODEL argument",
    "tensor_parallel_size": "--tp",
    "pipeline_parallel_size": "--pp",
    "enable_expert_parallel": "--ep",
    "host": "--host",
    "port": "--port",
    "api_key": "--api-key",
    "uds": "--host and --port",
    "data_parallel_size": "--replicas: each is one engine core; 'vllm serve' alone starts ranks that share experts",
    "data_parallel_rank": "--replicas",
    "data_parallel_start_rank": "--replicas",
    "data_parallel_size_local": "--replicas",
    "data_parallel_address": "--replicas",
    "data_parallel_rpc_port": "--replicas",
    "data_parallel_backend": "--replicas",
    "data_parallel_hybrid_lb": "--replicas",
    "data_parallel_external_lb": "--replicas",
    "api_server_count": "--gateways",
    "headless": "--replicas",
    "distributed_executor_backend": "nothing: kervan places the workers",
    "nnodes": "nothing: kervan places the workers",
    "node_rank": "nothing: kervan places the workers",
    "master_addr": "nothing: kervan places the workers",
    "master_port": "nothing: kervan places the workers",
    "root_path": "nothing: kervan serves at the root",
    "ssl_keyfile": "a TLS proxy in front of the gateways",
    "ssl_certfile": "a TLS proxy in front of the gateways",
}


def check_owned(names: Iterable[str]) -> None:
    """Raises: ConfigError for an argument that kervan decides, with what to use in its place."""
    for name in names:
        if name in OWNED:
            raise ConfigError(f"engine argument {name!r} is kervan's to set; use {OWNED[name]}")


def to_argv(arguments: Mapping[str, Any]) -> list[str]:
    """The arguments as vLLM's server parser reads them: `--key value`, `--key` for true, `--no-key` for false.

    None, YAML's null, is left out: vLLM's own default.
    """
    return [word for key, value in arguments.items() for word in _words(key, value)]


def _words(key: str, value: Any) -> list[str]:
    flag = "--" + key.replace("_", "-")
    if value is None:
        return []
    if isinstance(value, bool):
        return [flag] if value else ["--no-" + key.replace("_", "-")]
    if isinstance(value, Mapping):
        return [flag, json.dumps(value)]
    if isinstance(value, list | tuple):
        return [flag, *(json.dumps(v) if isinstance(v, Mapping) else str(v) for v in value)]
    return [flag, str(value)]


def parse_value(text: str) -> Any:
    """A value as the user wrote it: `true`/`false` and JSON objects are read, the rest stays for vLLM to read.

    Raises: ConfigError for broken JSON.
    """
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text[:1] in ("{", "["):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"engine argument value {text!r} is not valid JSON ({error}); quote it for the shell"
            ) from error
    return text
