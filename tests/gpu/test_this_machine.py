"""On NVIDIA GPUs: NVML and nvidia-smi say the same of them, and CUDA counts as much memory as the table says.

Runs without the project's pytest plugins too:
    PYTHONPATH=src python3 -m pytest -c /dev/null --rootdir . tests/gpu/test_this_machine.py
"""

import ctypes
import dataclasses
import shutil

import pytest

from kervan.observe import machine, nvidia_smi, nvml

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="needs an NVIDIA GPU"),
]


def test_both_readers_say_the_same() -> None:
    by_nvml, by_program = nvml.read(), nvidia_smi.read()
    if by_nvml is None:
        pytest.skip("needs the package nvidia-ml-py")
    assert by_program is not None
    assert dataclasses.replace(by_nvml, reader="nvidia-smi") == by_program


def test_cuda_counts_the_memory_of_the_table() -> None:
    cuda = ctypes.CDLL("libcuda.so.1")
    device, total = ctypes.c_int(), ctypes.c_size_t()
    assert cuda.cuInit(0) == 0
    assert cuda.cuDeviceGet(ctypes.byref(device), 0) == 0
    assert cuda.cuDeviceTotalMem_v2(ctypes.byref(total), device) == 0
    found = machine.read()
    print(found)
    assert found.gpu.memory_gib == pytest.approx(total.value / 2**30, rel=0.003)
