"""The arguments of vLLM's own server: which ones kervan decides, and how they are read and written."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from kervan.errors import ConfigError
from kervan.vendor.vllm_names import JSON_LIST_ARGUMENTS, REPEATED_ARGUMENTS, SWITCH_ARGUMENTS

MAX_SHOWN_CHARS = 200  # of a value, in an error
QUOTED = re.compile(r'("(?:[^"\\]|\\.)*")')
HUMAN_NUMBER = re.compile(r"\b\d+(?:\.\d+)?[kKmMgGtT]\b")

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

    A list is written as its option reads it: as words after it, as JSON, or with the option for each item. None, YAML's
    null, is left out: vLLM's own default.
    """
    return [word for key, value in arguments.items() for word in _words(key, value)]


def _words(key: str, value: Any) -> list[str]:
    flag = "--" + key.replace("_", "-")
    if value is None or (value is False and key in SWITCH_ARGUMENTS):
        return []
    if isinstance(value, bool):
        return [flag] if value else ["--no-" + key.replace("_", "-")]
    if isinstance(value, list | tuple) and key not in JSON_LIST_ARGUMENTS:
        items = [_word(item) for item in value]
        if key in REPEATED_ARGUMENTS:
            return [word for item in items for word in _option(flag, item)]
        return _option(flag, items[0]) if len(items) == 1 else [flag, *items]
    return _option(flag, _word(value))


def _word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, Mapping | list | tuple) else str(value)


def _option(flag: str, word: str) -> list[str]:
    """An option and its value, in one word where the parser would take the value for an option too."""
    return [f"{flag}={word}"] if word.startswith("-") else [flag, word]


def parse_value(text: str) -> Any:
    """A value as the user wrote it: `true`/`false` and JSON objects are read, the rest stays for vLLM to read.

    Raises: ConfigError for broken JSON.
    """
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text[:1] in ("{", "["):
        try:
            return json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            if (plain := with_plain_numbers(text)) != text and _is_json(plain):
                return text
            reason = "nested too deeply" if isinstance(error, RecursionError) else error
            raise ConfigError(
                f"engine argument value {text[:MAX_SHOWN_CHARS]!r} is not valid JSON ({reason}); quote it for the shell"
            ) from error
    return text


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return False
    return True


def with_plain_numbers(text: str) -> str:
    """JSON in which numbers may end in k or G, as vLLM takes it for its configs, with other numbers in their place."""
    parts = QUOTED.split(text)
    parts[::2] = [HUMAN_NUMBER.sub("1", part) for part in parts[::2]]
    return "".join(parts)
