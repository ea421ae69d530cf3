"""Options of commands that start ranks of torch, on this host or several."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from kervan.cli import option_types
from kervan.errors import ConfigError

if TYPE_CHECKING:
    from kervan.ranks.rank import Nodes

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])
MAX_RANKS = 4096

device = click.option(
    "--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True,
    help="Where to run; auto: GPUs if this host has any.",
)  # fmt: skip
ranks = click.option(
    "--ranks", type=click.IntRange(1, MAX_RANKS), default=1, show_default=True, help="Processes on this host."
)


def nodes(command: FunctionT) -> FunctionT:
    """--nodes, --node-rank and --rendezvous, as torchrun has them."""
    for option in (
        click.option("--rendezvous", type=option_types.RENDEZVOUS, help="HOST:PORT of node 0, the same on all nodes."),
        click.option("--node-rank", type=click.IntRange(0, MAX_RANKS), default=0, show_default=True,
                     help="Which of the nodes this is."),
        click.option("--nodes", type=click.IntRange(1, MAX_RANKS), default=1,
                     help="Hosts; give the command on each of them.", show_default=True),
    ):  # fmt: skip
        command = option(command)
    return command


def chosen_nodes(given: dict[str, Any]) -> "Nodes":
    """Of the three options. Raises: ConfigError."""
    from kervan.ranks.rank import Nodes

    return Nodes(given["nodes"], given["node_rank"], given["rendezvous"] or "")


def chosen_device(given: str) -> Literal["cuda", "cpu"]:
    """What `auto` means here. Raises: ConfigError for GPUs on a host without."""
    has_gpu = Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None
    if given == "cuda" and not has_gpu:
        raise ConfigError("--device cuda: this host has no NVIDIA driver; give --device cpu, or run it on a GPU host")
    if given == "auto":
        return "cuda" if has_gpu else "cpu"
    return "cuda" if given == "cuda" else "cpu"


def check_torch(command: str) -> None:
    """Raises: ConfigError where torch is not installed. Does not load it."""
    import importlib.util

    if importlib.util.find_spec("torch") is None:
        raise ConfigError(
            f"kervan {command} needs torch, and it is not installed; run pip install 'kervan[gpu]', or on a CPU "
            "pip install 'kervan[cpu]'"
        )


def check_deepspeed(sharding: str) -> None:
    """Raises: ConfigError where DeepSpeed is not installed. Does not load it."""
    import importlib.util

    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            f"{sharding} is DeepSpeed's, and it is not installed; run DS_BUILD_OPS=0 pip install --no-build-isolation "
            "deepspeed==0.19.8"
        )
