"""One GPU: copy bandwidth, matrix products, attention, and the shortest times of a kernel.

Attention is torch's own (the fastest of its flash and cuDNN kernels); vLLM's kernels are not imported here.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kervan.calibrate.measurements import Attention, Copy, Floor, Matmul
from kervan.comm.clock import Call, Clock, CpuClock, CudaClock, capture, elapsed_s
from kervan.ranks.rank import Rank

KernelRow = Copy | Matmul | Attention | Floor
MIB = 1 << 20
ROTATED_BYTES = 256 * MIB  # different weights or caches in turn, more than any cache of a GPU holds
CHAIN = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What is measured. `matmul_nk`: outputs and inputs of a linear layer. `max_kv_bytes`: of a decode batch."""

    copy_bytes: tuple[int, ...] = (64 * MIB, 256 * MIB, 1024 * MIB)
    matmul_m: tuple[int, ...] = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    matmul_nk: tuple[tuple[int, int], ...] = (
        (6144, 4096),  # Llama 8B: q, k and v
        (4096, 4096),  # output projection
        (28672, 4096),  # gate and up
        (4096, 14336),  # down
        (14336, 8192),  # Llama 70B over 4 GPUs: gate and up
        (8192, 7168),  # down
    )
    prefill_tokens: tuple[int, ...] = (1024, 2048, 4096, 8192)
    decode_batches: tuple[int, ...] = (1, 8, 32, 64, 128, 256)
    decode_tokens: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    max_kv_bytes: int = 4 * 1024 * MIB


QUICK = Sizes(
    copy_bytes=(256 * MIB,),
    matmul_m=(1, 16, 64, 256, 1024, 4096),
    matmul_nk=((6144, 4096), (28672, 4096), (4096, 14336)),
    prefill_tokens=(1024, 4096),
    decode_batches=(1, 32, 128),
    decode_tokens=(1024, 4096),
)


@dataclass(frozen=True, slots=True)
class HostGpus:
    """What torch says of the accelerators: `name` and `memory_bytes` of the first."""

    name: str
    count: int
    memory_bytes: int
    versions: tuple[tuple[str, str], ...]


def look(rank: Rank, arguments: None, keep: Callable[[Any], None]) -> None:
    """Work of one rank: keeps `HostGpus`, or None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        keep(None)
        return
    first = torch.cuda.get_device_properties(0)
    versions = {"torch": str(torch.__version__), "cuda": str(torch.version.cuda)}
    if torch.distributed.is_available() and torch.distributed.is_nccl_available():
        versions["nccl"] = ".".join(str(n) for n in torch.cuda.nccl.version())
    keep(HostGpus(first.name, torch.cuda.device_count(), first.total_memory, tuple(versions.items())))


def work(rank: Rank, arguments: tuple[str, Sizes], keep: Callable[[KernelRow], None]) -> None:
    """Work of one rank: `arguments` are a torch device and the sizes."""
    device, sizes = arguments
    for row in measure(device, sizes):
        keep(row)


def measure(device: str, sizes: Sizes) -> Iterator[KernelRow]:
    """Rows, the quick and important ones first. Takes about half a minute on a GPU with the default sizes."""
    import torch

    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(device)
    clock: Clock = CudaClock() if on_gpu else CpuClock()
    with torch.inference_mode():
        yield from _floors(device)
        yield from _copies(device, clock, sizes)
        for n, k in sizes.matmul_nk:
            yield from _matmuls(device, clock, n, k, sizes.matmul_m)
        yield from _prefills(device, clock, sizes)
        yield from _decodes(device, clock, sizes)


def _floors(device: str) -> Iterator[Floor]:
    import torch

    scalar = torch.zeros(1, device=device)

    def add() -> None:
        scalar.add_(1)

    if device.startswith("cuda"):
        chain, _ = capture([add], CHAIN)
        chain.replay()
        yield Floor("graph_kernel", min(elapsed_s(chain.replay) for _ in range(10)) / CHAIN)
        single, _ = capture([add], 1)
        took_s = []
        for _ in range(50):
            torch.cuda.synchronize()
            begin_s = time.perf_counter()
            single.replay()
            torch.cuda.synchronize()
            took_s.append(time.perf_counter() - begin_s)
        yield Floor("graph_launch", sorted(took_s)[len(took_s) // 2])
    took_s = []
    for _ in range(10):
        begin_s = time.perf_counter()
        for _ in range(CHAIN):
            add()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        took_s.append((time.perf_counter() - begin_s) / CHAIN)
    yield Floor("eager_kernel", min(took_s))


def _copies(device: str, clock: Clock, sizes: Sizes) -> Iterator[Copy]:
    import torch

    for size in sizes.copy_bytes:
        source = torch.ones(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        yield Copy(2 * size, clock.seconds([lambda source=source, target=target: target.copy_(source)]))  # type: ignore[misc]


def _matmuls(device: str, clock: Clock, n: int, k: int, ms: Sequence[int]) -> Iterator[Matmul]:
    """Random values, since a GPU is faster on zeros; the weights in turn, since a model reads each once in a step."""
    import torch

    copies = -(-ROTATED_BYTES // (2 * n * k)) if device.startswith("cuda") else 2
    weights = [_random(device, n, k) for _ in range(copies)]
    for m in ms:
        x, y = _random(device, m, k), torch.empty(m, n, dtype=torch.bfloat16, device=device)

        def product(weight: Any, x: Any = x, y: Any = y) -> Call:
            return lambda: torch.mm(x, weight.t(), out=y)

        yield Matmul(m, n, k, clock.seconds([product(weight) for weight in weights]))


def _prefills(device: str, clock: Clock, sizes: Sizes) -> Iterator[Attention]:
    """Key and value heads are repeated beforehand: torch's kernels do not all take fewer, and prefill computes."""
    for tokens in sizes.prefill_tokens:
        q, k, v = (_random(device, 1, sizes.num_heads, tokens, sizes.head_dim) for _ in range(3))
        backend, seconds = _fastest(device, clock, [(q, k, v)], is_causal=True)
        yield Attention(
            "prefill", 1, tokens, sizes.num_heads, sizes.num_kv_heads, sizes.head_dim, backend, seconds
        )  # fmt: skip


def _decodes(device: str, clock: Clock, sizes: Sizes) -> Iterator[Attention]:
    """The heads that share a key and value head stand as that many queries: what grouped attention computes."""
    group = sizes.num_heads // sizes.num_kv_heads
    for batch in sizes.decode_batches:
        for tokens in sizes.decode_tokens:
            kv_bytes = 2 * 2 * batch * tokens * sizes.num_kv_heads * sizes.head_dim
            if kv_bytes > sizes.max_kv_bytes:
                continue
            copies = min(64, -(-ROTATED_BYTES // kv_bytes)) if device.startswith("cuda") else 1
            sets = []
            for _ in range(copies):
                q = _random(device, batch, sizes.num_kv_heads, group, sizes.head_dim)
                k, v = (_random(device, batch, sizes.num_kv_heads, tokens, sizes.head_dim) for _ in range(2))
                sets.append((q, k, v))
            backend, seconds = _fastest(device, clock, sets, is_causal=False)
            yield Attention(
                "decode", batch, tokens, sizes.num_heads, sizes.num_kv_heads, sizes.head_dim, backend, seconds
            )


def _fastest(device: str, clock: Clock, sets: Sequence[tuple[Any, Any, Any]], *, is_causal: bool) -> tuple[str, float]:
    """Name and seconds of the kernel that is fastest here; one that does not take these shapes is passed over."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def attention(q: Any, k: Any, v: Any) -> Call:
        return lambda: scaled_dot_product_attention(q, k, v, is_causal=is_causal)

    calls = [attention(*qkv) for qkv in sets]
    backends = {"flash": SDPBackend.FLASH_ATTENTION}
    if device.startswith("cuda"):
        backends["cudnn"] = SDPBackend.CUDNN_ATTENTION
    timings: list[tuple[float, str]] = []
    refusals = []
    for name, backend in backends.items():
        with sdpa_kernel(backend):
            try:
                calls[0]()
            except RuntimeError as error:
                refusals.append(f"{name}: {error}")
                continue
            timings.append((clock.seconds(calls), name))
    if not timings:
        raise RuntimeError("; ".join(refusals))
    seconds, name = min(timings)
    return name, seconds


def _random(device: str, *shape: int) -> Any:
    import torch

    return torch.randn(shape, dtype=torch.bfloat16, device=device)
