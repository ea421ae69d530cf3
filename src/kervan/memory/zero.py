"""DeepSpeed's ZeRO over the ranks, with torch's AdamW: no operator of DeepSpeed's own has to be built."""

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from kervan.errors import ConfigError
from kervan.memory.decoder import saving
from kervan.memory.estimate import MAX_LIVE, PREFETCH_BUCKET, REDUCE_BUCKET
from kervan.memory.optimizers import ADAM_EPS, BETAS, WEIGHT_DECAY
from kervan.memory.techniques import Recipe
from kervan.ranks.rank import Rank

INSTALL = "DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed==0.19.8"
PERSISTENT = 100_000  # numbers of a parameter that ZeRO-3 keeps whole


def settings(recipe: Recipe, micro_batches: int) -> dict[str, Any]:
    """DeepSpeed's configuration of a recipe."""
    zero: dict[str, Any] = {
        "stage": int(recipe.sharding[-1]),
        "reduce_bucket_size": REDUCE_BUCKET,
        "allgather_bucket_size": REDUCE_BUCKET,
        "contiguous_gradients": True,
        "overlap_comm": False,
    }
    if recipe.sharding == "zero3":
        zero |= {
            "stage3_max_live_parameters": MAX_LIVE,
            "stage3_prefetch_bucket_size": PREFETCH_BUCKET,
            "stage3_param_persistence_threshold": PERSISTENT,
            "stage3_max_reuse_distance": MAX_LIVE,
        }
    pinned = torch.cuda.is_available()
    if recipe.has_optimizer_offloaded:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
    if recipe.has_params_offloaded:
        zero["offload_param"] = {"device": "cpu", "pin_memory": pinned}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "steps_per_print": 1_000_000,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW runs on host memory too, and needs no compiler
        "bf16": {"enabled": recipe.precision == "bf16"},
        "gradient_clipping": 0.0,
    }


class Zero:
    """A DeepSpeed engine as `setups.Training`."""

    def __init__(self, model: Any, recipe: Recipe, rank: Rank, device: Any, lr: float, micro_batches: int) -> None:
        deepspeed = _deepspeed(on_gpu=device.type == "cuda")
        self._recipe, self._module, self._micro_batches, self._done = recipe, model, micro_batches, 0
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=lr, betas=BETAS, eps=ADAM_EPS, weight_decay=WEIGHT_DECAY, foreach=False, fused=True
        )
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings(recipe, micro_batches), dist_init_required=False
        )

    def forward(self, tokens: Any, targets: Any) -> Any:
        with saving(self._module, self._recipe):
            return self._engine(tokens, targets)

    def backward(self, loss: Any) -> None:
        if self._done:  # DeepSpeed counts calls of step, and acts on the one after the last micro-batch
            self._engine.step()
        self._engine.backward(loss)
        self._done += 1

    def step(self) -> None:
        self._engine.step()
        self._done = 0

    def set_lr(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def weights(self) -> Iterator[Any]:
        for parameter in self._module.parameters():
            shard = getattr(parameter, "ds_tensor", None)
            yield parameter.data if shard is None else shard

    def states(self) -> Iterator[Any]:
        for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
            yield from (group.data for group in getattr(self._optimizer, name, ()) if torch.is_tensor(group))
        inner = getattr(self._optimizer, "optimizer", self._optimizer)
        for state in inner.state.values():
            yield from (value for value in state.values() if torch.is_tensor(value))

    def gradients(self) -> Iterator[Any]:
        yield from (p.grad for p in self._module.parameters() if p.grad is not None)
        averaged = getattr(self._optimizer, "averaged_gradients", {})
        for group in averaged.values() if isinstance(averaged, dict) else ():
            yield from (one for one in (group or ()) if torch.is_tensor(one))
        flat = getattr(self._optimizer, "grad_partitions_flat_buffer", None)
        if torch.is_tensor(flat):
            yield flat

    def close(self) -> None:
        """Take DeepSpeed's hooks off the parameters: they hold the engine, which is never freed otherwise."""
        self._engine.destroy()


def extensions_dir() -> Path:
    """Where torch builds extensions of C++ and CUDA (torch.utils.cpp_extension.get_default_build_root)."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(given) if given else Path.home() / ".cache" / "torch_extensions"


def stale_locks(directory: Path) -> list[Path]:
    """Lock files of builds that no process works on: torch waits for such a file to vanish, whoever made it.

    A build runs ninja or a compiler with the lock's directory as working directory, or on its command line.
    """
    locks = sorted(directory.glob("**/lock"))
    if not locks:
        return []
    words = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            words.add(process.cwd())
            words.update(process.cmdline())
    return [lock for lock in locks if not any(str(lock.parent) in word for word in words)]


def _deepspeed(*, on_gpu: bool) -> Any:
    """The package. Raises: ConfigError when it is not installed, or a build of it would be waited for without end."""
    import importlib.util

    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(f"zero1, zero2 and zero3 are DeepSpeed's, and it is not installed; run {INSTALL}")
    import logging

    if locks := stale_locks(extensions_dir()):
        raise ConfigError(
            f"{locks[0]} was left by a build of a torch extension that was ended, and DeepSpeed would wait for "
            "it without "
            f"end; delete it: rm {' '.join(str(lock) for lock in locks)}"
        )
    import deepspeed

    if not on_gpu:  # it compiles for minutes, to save microseconds of gloo's
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed
