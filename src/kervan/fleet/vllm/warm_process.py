"""`python -m kervan.fleet.vllm.warm_process FD PLACE PID`: what a node's engines and gateways are forked from.

It imports what every engine imports before it touches its device (`kervan.fleet.fork_server`), and what gateways import
beyond that when it has forked the first one: a second process would cost more than they need of each other's modules.
"""

import contextlib
import ctypes
import importlib
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence, Set
from typing import Any

from kervan.fleet import fork_server

logger = logging.getLogger(__name__)

GATEWAY = "kervan.gateway.program"
LINGER_S = 120.0  # longer than Serve takes to start a replica in the place of one that is gone
# What an engine loads after `replica`, before its first step; those of other devices cannot be imported. The log of a
# forked replica says what it has imported since.
LATE_MODULES = (
    "vllm.v1.worker.gpu_worker",
    "vllm.v1.worker.gpu_model_runner",
    "vllm.v1.worker.gpu.model_runner",
    "vllm.v1.executor.multiproc_executor",
    "vllm.model_executor.model_loader.default_loader",
    "vllm.model_executor.model_loader.dummy_loader",
    "vllm.model_executor.warmup.kernel_warmup",
    "vllm.v1.attention.backends.flash_attn",
    "xgrammar",
    "transformers",
)
# For engines that compile; they import these although what they compile is in vLLM's cache.
COMPILING_MODULES = (
    "vllm.compilation.backends",
    "vllm.compilation.caching",
    "vllm.compilation.cuda_graph",
    "torch._dynamo",
    "torch._dynamo.aot_compile",
    "torch._functorch.aot_autograd",
    "torch._inductor.compile_fx",
    "torch._inductor.output_code",
    "torch._inductor.standalone_compile",
    "torch._inductor.async_compile",
    "torch._inductor.runtime.triton_heuristics",
    "triton",
)
# NVML's (driver 580: "cuda" and a number) and pyarrow's: libraries that put themselves right in a fork.
HARMLESS_THREADS = ("cuda0", "jemalloc_bg_thd")
CUDA_SUCCESS, CUDA_ERROR_NO_DEVICE = 0, 100
_known: set[str] = set()  # "" when vLLM is imported, model classes, GATEWAY


def prepare(program: str, hints: Sequence[str]) -> Callable[[], None] | None:
    """Import vLLM and, for an engine, the classes of its model: `hints` names them as a Hugging Face config does.

    For a gateway, returns what imports vLLM's server; the first gateway does so itself, as an engine may wait to be
    forked. Raises: NotForkableError when CUDA could not be used in a fork any more.
    """
    is_first = not _known
    if is_first:
        _allow_titles()
        from kervan.fleet.vllm import first_error

        first_error.install()  # a gateway may come later
        _import("kervan.fleet.vllm.replica")
        from vllm.platforms import current_platform

        cpu = ("vllm.v1.worker.cpu_worker", "vllm.v1.worker.cpu_model_runner")
        for name in (*LATE_MODULES, *(cpu if current_platform.is_cpu() else COMPILING_MODULES)):
            _import(name)
        from kervan.fleet.vllm import versions

        versions.parse_args(["--model", "none"])  # builds the parser, whose help texts take a second
        _known.add("")
    if program == GATEWAY:
        return None if GATEWAY in _known else _import_gateway
    if fresh := set(hints) - _known:
        from kervan.fleet.vllm import head_start

        head_start.look_at(sorted(fresh))
        _known.update(fresh)
    if (is_first or fresh) and not fork_server.in_a_fork(_cuda_starts):
        raise fork_server.NotForkableError("the imports have started CUDA, which a fork cannot use then")
    return None


def _import_gateway() -> None:
    from kervan.fleet.vllm import versions

    _import(GATEWAY)
    _import("kervan.fleet.vllm.frontend")
    versions.app_modules()
    _known.add(GATEWAY)


def run(program: str, control_fd: int, asked_s: float) -> Any:
    """Be `program`, in a fork: what `python -m program FD` does otherwise."""
    return importlib.import_module(program).run(control_fd, asked_s, is_forked=True)


def _allow_titles() -> None:
    """Let children name themselves for `ps`: setproctitle must have seen the environment where a process began."""
    with contextlib.suppress(ImportError):
        from setproctitle import getproctitle

        getproctitle()


def _cuda_starts() -> bool:
    """Whether this process can begin to use CUDA, if there is any."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return True
    return cuda.cuInit(0) in (CUDA_SUCCESS, CUDA_ERROR_NO_DEVICE)


def tell_imports(before: Set[str]) -> None:
    """Write to the log which modules came after `before`: candidates for the lists above."""
    fresh = [name for name in sys.modules if name not in before]
    packages = Counter(".".join(name.split(".")[:2]) for name in fresh)
    most = ", ".join(f"{name} {count}" for name, count in packages.most_common(12))
    logger.info("%d modules imported after the fork: %s", len(fresh), most)


def fork_workers() -> None:
    """Let vLLM's workers of a forked engine be forked too, where its platform would start them anew for nothing.

    On a GPU it forks them by itself. On a CPU it spawns them, because OpenMP reads where its threads are bound when a
    process starts; without a binding, fork is as good. Called when the platform has decided.
    """
    from vllm import envs
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and envs.VLLM_CPU_OMP_THREADS_BIND == "nobind":
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"


def _import(name: str) -> None:
    try:
        importlib.import_module(name)
    except ImportError as error:  # the engine will do without it, or say what is wrong
        logger.info("%s: %s", name, error)


if __name__ == "__main__":
    fork_server.main(prepare, run, linger_s=LINGER_S, harmless_threads=HARMLESS_THREADS)
