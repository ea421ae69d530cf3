"""GPUs: memory, bandwidth, arithmetic. Vendors' numbers; no machine is asked.

Source: data sheets of NVIDIA and AMD, dense rates without sparsity. Memory as the vendor writes it, which is close to
GiB (an H200 of "141 GB" has 140.4 GiB for software).
"""

import difflib
from dataclasses import dataclass

from kervan.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. `bf16_flops`: dense, per second."""

    name: str
    memory_gib: float
    bandwidth_bytes_s: float
    bf16_flops: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A10G", 24, 0.60e12, 70e12),
        Gpu("L4", 24, 0.30e12, 121e12),
        Gpu("L40S", 48, 0.864e12, 362e12),
        Gpu("A100-40", 40, 1.555e12, 312e12),
        Gpu("A100", 80, 2.04e12, 312e12),
        Gpu("H100", 80, 3.35e12, 989e12),
        Gpu("H200", 141, 4.8e12, 989e12),
        Gpu("B200", 180, 7.7e12, 2250e12),
        Gpu("GB200", 186, 8.0e12, 2500e12),
        Gpu("MI300X", 192, 5.3e12, 1307e12),
    )
}


def gpu(name: str) -> Gpu:
    """The GPU of this name, in any case.

    Raises: ConfigError for a name that is not in the table.
    """
    known = {key.lower(): value for key, value in GPUS.items()}
    found = known.get(name.lower())
    if found is None:
        near = difflib.get_close_matches(name.lower(), known, n=1)
        hint = f"did you mean {known[near[0]].name}? " if near else ""
        raise ConfigError(f"no GPU {name!r} is known; {hint}known: {', '.join(GPUS)} (--gpu)")
    return found
