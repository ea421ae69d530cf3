"""The table of GPUs: sources of all numbers, names, and that the numbers agree with each other."""

import dataclasses
import json

import pytest
from harness.places import REPOSITORY

from kervan.errors import ConfigError
from kervan.facts import hardware
from kervan.facts.hardware import GPUS, Gpu
from kervan.facts.hardware_sources import SOURCES

NUMBERS = {f.name for f in dataclasses.fields(Gpu)} - {"name", "sources"}


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_every_number_has_a_source(gpu: Gpu) -> None:
    assert set(gpu.sources) == NUMBERS
    assert set(gpu.sources.values()) <= set(SOURCES)


def test_every_source_is_used_and_says_where_it_is() -> None:
    used = {key for gpu in GPUS.values() for key in gpu.sources.values()}
    assert used | {"machine"} == set(SOURCES)  # the table itself has nothing from the machine it is read on
    for key, source in SOURCES.items():
        assert source.title, key
        assert source.is_read or source.url.startswith("https://") or source.title.startswith("derived"), key


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_memory_is_what_software_showed(gpu: Gpu) -> None:
    assert SOURCES[gpu.sources["memory_mib"]].is_read
    # What CUDA counts is what nvidia-smi shows without what the driver keeps for itself.
    assert 0.97 * gpu.memory_mib < gpu.memory_gib * 1024 < 1.0001 * gpu.memory_mib


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_rates_are_dense_and_links_one_way(gpu: Gpu) -> None:
    # Half the bits, twice the rate. FP4 with FP32 accumulation on the RTX 5090 is 4 times FP8, B300's more than twice.
    assert gpu.fp8_flops == 0 or gpu.fp8_flops == pytest.approx(2 * gpu.bf16_flops, rel=0.015)
    assert gpu.fp4_flops == 0 or 1.9999 * gpu.fp8_flops <= gpu.fp4_flops <= 4 * gpu.fp8_flops
    assert gpu.link.bytes_s < gpu.bandwidth_bytes_s
    assert gpu.pcie_bytes_s in (16e9, 32e9, 64e9, 128e9)
    assert (gpu.link.kind == "pcie") == (gpu.link.bytes_s == gpu.pcie_bytes_s)
    assert gpu.link.max_gpus >= 2


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("H200", "H200"),
        ("h200", "H200"),
        ("nvidia h200", "H200"),
        ("NVIDIA H200", "H200"),
        ("h100_sxm", "H100"),
        ("H100-SXM5-80GB", "H100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H100 NVL", "H100-NVL"),
        ("h100pcie", "H100-PCIe"),
        ("A100-80GB", "A100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-SXM4-40GB", "A100-40"),
        ("NVIDIA A100 80GB PCIe", "A100-PCIe"),
        ("a100 40gb", "A100-40"),
        ("rtx 4090", "RTX4090"),
        ("NVIDIA GeForce RTX 5090", "RTX5090"),
        ("NVIDIA B300 SXM6 AC", "B300"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA L40S", "L40S"),
        ("Tesla T4", "T4"),
        ("v100", "V100"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("v100-32gb", "V100-32"),
        ("Tesla V100-SXM2-32GB", "V100-32"),
        ("a6000", "RTX-A6000"),
        ("NVIDIA RTX A6000", "RTX-A6000"),
        ("rtx-pro-6000", "RTX-PRO-6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX-PRO-6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX-PRO-6000-Workstation"),
        ("NVIDIA H20", "H20"),
        ("NVIDIA H20-3e", "H20-141"),
        ("AMD Instinct MI325X", "MI325X"),
        ("AMD Instinct MI355X", "MI355X"),
    ],
)
def test_names_are_read_in_any_spelling(name: str, row: str) -> None:
    assert hardware.gpu(name).name == row


def test_no_alias_hides_a_row() -> None:
    rows = {hardware._key(name) for name in GPUS}
    assert not rows & set(hardware.ALIASES)
    assert set(hardware.ALIASES.values()) <= set(GPUS)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("H2000", r"no GPU 'H2000' is known; did you mean H200\? known: T4, V100"),
        ("rtx4099", r"did you mean RTX4090\?"),
        ("TPU v5e", r"no GPU 'TPU v5e' is known; known: T4, V100"),
        ("", r"no GPU '' is known; known: "),
        # Near names that are other GPUs: an A10 has more tensor rate than an A10G, a GH200 of 144 GB more memory.
        ("NVIDIA A10", r"did you mean A10G\?"),
        ("GH200 144G HBM3e", r"no GPU 'GH200 144G HBM3e' is known"),
        ("A100 PCIe 40GB", r"no GPU 'A100 PCIe 40GB' is known"),
        # Slower clocks, other links, other generations.
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", r"did you mean RTX-PRO-6000-Workstation\?"),
        ("Tesla V100-PCIE-16GB", r"no GPU 'Tesla V100-PCIE-16GB' is known"),
        ("Quadro RTX 6000", r"no GPU 'Quadro RTX 6000' is known"),
        ("NVIDIA RTX 6000 Ada Generation", r"no GPU 'NVIDIA RTX 6000 Ada Generation' is known"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        hardware.gpu(name)


@pytest.mark.parametrize(
    "line", (REPOSITORY / "benchmarks/records/memory-h200-2026-11-22.jsonl").read_text().splitlines()
)
def test_the_h200s_memory_is_what_vllm_divided(line: str) -> None:
    """Share of the GPU = weights + KV cache + what a step needs, which was 1.3 to 1.5 GiB on one GPU and on four."""
    row = json.loads(line)
    share_gib = row["gpu_memory_utilization"] * hardware.gpu("H200").memory_gib
    rest_gib = share_gib - row["weights_gib_per_gpu"] - row["kv_cache_gib_per_gpu"]
    assert rest_gib == pytest.approx(1.4, abs=0.15)
