"""Where the numbers of `hardware.GPUS` are from.

A vendor's sheet is named with its own address. `checked` is where its numbers were read again on 2026-11-25, those of
T4, V100, RTX-A6000, RTX-PRO-6000, H20, MI325X and MI355X on 2026-11-29; for most that is a page that repeats the
sheet's table. It is empty for numbers that were not re-checked.
"""

from dataclasses import dataclass

ITSELF = "itself"


@dataclass(frozen=True, slots=True)
class Source:
    """`is_read`: what software showed on such a GPU, not what a sheet promises."""

    title: str
    url: str = ""
    checked: str = ""
    is_read: bool = False


def _read(title: str, url: str = "") -> Source:
    return Source(title, url, ITSELF, is_read=True)


_KLOCKWOOD = "https://glennklockwood.com/garden/processors/"
_PUBLIC_LOGS = "several public logs"

SOURCES: dict[str, Source] = {
    # ---- data sheets
    "t4": Source(
        "NVIDIA T4 data sheet",
        "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/tesla-t4/t4-tensor-core-datasheet-951643.pdf",
        "https://sysrqmts.com/en/gpus/nvidia/tesla/t4",
    ),
    "v100": Source(
        "NVIDIA V100 data sheet, column SXM2; bandwidth and links re-checked, the tensor rate not",
        "https://images.nvidia.com/content/technologies/volta/pdf/volta-v100-datasheet-update-us-1165301-r5.pdf",
        "http://www.manualshelf.com/manual/dell/high-performance-computing-solution-resources/reference-guide-english/page-17.html",
    ),
    "a10g": Source(
        "NVIDIA A10G data sheet for Amazon EC2 G5",
        "https://d1.awsstatic.com/product-marketing/ec2/NVIDIA_AWS_A10G_DataSheet_FINAL_02_17_2022.pdf",
    ),
    "l4": Source(
        "NVIDIA L4 product page; its rates are with sparsity",
        "https://www.nvidia.com/en-us/data-center/l4/",
        "https://github.com/winston-zhang-orz/gpu-specs",
    ),
    "l40s": Source(
        "NVIDIA L40S data sheet",
        "https://resources.nvidia.com/en-us-l40s/l40s-datasheet-28413",
        "https://www.mullet.se/product.html?product_id=355414",
    ),
    "a6000": Source(
        "NVIDIA RTX A6000 page; its tensor rate is with sparsity",
        "https://www.nvidia.com/en-us/products/workstations/rtx-a6000/",
        "https://llmperf.net/categories/gpu/Nvidia-A6000-GPUs",
    ),
    "a6000-bridge": Source(
        "NVIDIA RTX A6000 page: a bridge joins two, 112.5 GB/s in both directions together",
        "https://www.nvidia.com/en-us/products/workstations/rtx-a6000/",
        "https://servethehome.com/nvidia-rtx-a6000-48gb-gpu-drops-quadro-designation",
    ),
    "rtx-pro-6000": Source(
        "NVIDIA RTX PRO 6000 Blackwell Server Edition data sheet of December 2025",
        "https://dam-cdn.nvd.orangelogic.com/AssetLink/707m1632ypg4du1fj3ci1jo3h4w1k78j.pdf",
    ),
    "rtx-pro-6000-rates": Source(
        "derived: 4, 8 and 16 times the data sheet's 120 TFLOPS of FP32, as in the Workstation Edition's white paper; "
        "NVIDIA's page rounds them up to 0.5, 1 and 2 PFLOPS"
    ),
    "rtx-pro-6000-ws": Source(
        "NVIDIA RTX Blackwell PRO architecture white paper, Workstation Edition; bandwidth re-checked, rates not",
        "https://www.nvidia.com/content/dam/en-zz/Solutions/design-visualization/quadro-product-literature/NVIDIA-RTX-Blackwell-PRO-GPU-Architecture-v1.0.pdf",
        "https://gpu.name/posts/nvidia-unveils-rtx-pro-6000-blackwell-gpu-with-24-064-cores-and-96gb-memory",
    ),
    "a100-whitepaper": Source(
        "NVIDIA A100 architecture white paper",
        "https://images.nvidia.com/aem-dam/en-zz/Solutions/data-center/nvidia-ampere-architecture-whitepaper.pdf",
        _KLOCKWOOD + "A100",
    ),
    "a100": Source(
        "NVIDIA A100 data sheet",
        "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf",
        _KLOCKWOOD + "A100",
    ),
    "a100-pcie": Source(
        "NVIDIA A100 data sheet, column PCIe",
        "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf",
        "https://github.com/astroC86/gpu-datasheet",
    ),
    "h20": Source(
        "NVIDIA H20 data sheet, as a page repeats it: NVIDIA's site has none",
        "https://willitrunai.com/es/gpus/h20-96gb",
        "https://github.com/Dao-AILab/flash-attention/issues/1310",
    ),
    "h20-141": Source(
        "H20-3e profile of TileOPs: 4.8 TB/s, and the rates of the H20",
        "https://github.com/tile-ai/TileOPs/pull/1658",
        "https://github.com/NVIDIA/nvbandwidth/issues/48",
    ),
    "h100": Source(
        "NVIDIA H100 data sheet; its tensor rates are with sparsity",
        "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet",
        "https://archive-lib.hpctech.co.jp/gpuproduct/nvidia-h100.html",
    ),
    "h100-2022": Source(
        "NVIDIA H100 data sheet of 2022, with the PCIe card; its tensor rates are with sparsity",
        "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet",
        "https://archive-lib.hpctech.co.jp/gpuproduct/nvidia-h100.html",
    ),
    "h100-nvl": Source(
        "NVIDIA H100 data sheet, column H100 NVL; bandwidth, memory and bridge re-checked, tensor rates not",
        "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet",
        "https://www.aiminingco.com/gpu/h100-nvl/specs",
    ),
    "h200": Source(
        "NVIDIA H200 data sheet; its tensor rates are with sparsity",
        "https://resources.nvidia.com/en-us-data-center-overview-mc/en-us-data-center-overview/hpc-datasheet-sc23-h200",
        "https://github.com/astroC86/gpu-datasheet",
    ),
    "blackwell": Source(
        "NVIDIA Blackwell data sheet (GB200 NVL72, HGX B200); its tensor rates are with sparsity",
        "https://resources.nvidia.com/en-us-blackwell-architecture/datasheet",
        "https://zdszero.github.io/Computer/Artificial_Intelligence/Hardware.html",
    ),
    "b300": Source(
        "NVIDIA DGX B300 page: FP4 108 PFLOPS dense and FP8 72 with sparsity, for 8 GPUs; BF16 is half of FP8",
        "https://www.nvidia.com/en-us/data-center/dgx-b300/",
        "https://github.com/NVIDIA/cosmos-framework/pull/114",
    ),
    "b300-hgx": Source(
        "NVIDIA HGX page: up to 8 TB/s for each GPU of an HGX B300",
        "https://www.nvidia.com/en-us/data-center/hgx/",
        "https://acecloud.ai/blog/nvidia-hgx-b300",
    ),
    "b300-pcie": Source(
        "NVIDIA on Blackwell Ultra: PCIe 6 x16",
        "https://developer.nvidia.com/blog/inside-nvidia-blackwell-ultra-the-chip-powering-the-ai-factory-era/",
        _KLOCKWOOD + "B300",
    ),
    "gh200": Source(
        "NVIDIA GH200 data sheet, the module with 96 GB of HBM3; two of them make a GH200 NVL2",
        "https://resources.nvidia.com/en-us-grace-cpu/grace-hopper-superchip",
        "https://github.com/atineoSE/coding-model-seeks-gpu",
    ),
    "mi300x": Source(
        "AMD Instinct MI300X data sheet; 7 links of 64 GB/s to the other GPUs (the links were not re-checked)",
        "https://www.amd.com/content/dam/amd/en/documents/instinct-tech-docs/data-sheets/amd-instinct-mi300x-data-sheet.pdf",
        "https://www.jaredwatkins.com/research/ai-accelerators/amd-instinct/mi300-series/",
    ),
    "mi325x": Source(
        "AMD Instinct MI325X data sheet; 7 links of 64 GB/s to the other GPUs (the links were not re-checked)",
        "https://www.amd.com/content/dam/amd/en/documents/instinct-tech-docs/product-briefs/instinct-mi325x-datasheet.pdf",
        "https://awesomeagents.ai/hardware/amd-mi325x",
    ),
    "mi355x": Source(
        "AMD CDNA 4 white paper: 256 units at 2.4 GHz of 4096, 8192 and 16384 operations, and 7 links of 76.8 GB/s to "
        "the other GPUs (FP4 and links were not re-checked)",
        "https://www.amd.com/content/dam/amd/en/documents/instinct-tech-docs/white-papers/amd-cdna-4-architecture-whitepaper.pdf",
        "https://news.lavx.hu/article/isscc-2026-amd-s-mi355x-doubles-throughput-with-fewer-compute-units-and-challenges-nvidia-s-gb200",
    ),
    "rtx4090": Source(
        "NVIDIA Ada architecture white paper; rates with FP32 accumulation",
        "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf",
        "https://hmc-tech.com/gpus/nvidia-geforce-rtx-4090-vs-nvidia-rtx-pro-5000-blackwell",
    ),
    "rtx5090": Source(
        "NVIDIA RTX Blackwell architecture white paper; rates with FP32 accumulation",
        "https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf",
        "https://www.spheron.network/blog/nvidia-rtx-5090-specs/",
    ),
    "cuda-gpus": Source("NVIDIA, CUDA GPU compute capability", "https://developer.nvidia.com/cuda-gpus"),
    "rocm-gpus": Source(
        "AMD, GPU specifications",
        "https://rocm.docs.amd.com/en/7.13.0-preview/reference/gpu-specs.html",
        ITSELF,
    ),
    # ---- peer to peer
    "p2p-t4": _read(
        "Ray issue: on 4x T4 NCCL works only without peer access", "https://github.com/ray-project/ray/issues/15495"
    ),
    "p2p-g5": _read(
        "TensorRT-LLM issue: no peer access on g5.48xlarge", "https://github.com/NVIDIA/TensorRT-LLM/issues/1034"
    ),
    "p2p-g6": _read("llm-d: no peer access on g6", "https://github.com/llm-d-incubation/llm-d-infra/pull/181"),
    "p2p-4090": _read("NCCL issue: the RTX 4090 has no peer access", "https://github.com/NVIDIA/nccl/issues/1127"),
    "p2p-5090": _read(
        "Issue of a patched driver: NVIDIA's has no peer access on the RTX 5090",
        "https://github.com/tinygrad/open-gpu-kernel-modules/issues/29",
    ),
    "p2p-rtx-pro-6000": _read(
        "vLLM issue: 4x RTX PRO 6000 Server Edition with peer access over PCIe",
        "https://github.com/vllm-project/vllm/issues/56128",
    ),
    # ---- read from nvidia-smi, rocm-smi and amd-smi
    "h100-read": _read("read by us on 2x H100 SXM, driver 580.159.04, 2026-11-25: nvidia-smi, cuMemGetInfo"),
    "h200-read": _read("read by us on 1x H200 SXM: `gpu` in benchmarks/records/overhead-1xh200-2026-11-22.json"),
    "machine": _read("read on this machine by `--gpu local`"),
    "smi-modal": _read("nvidia-smi on a cloud's machines", "https://github.com/modal-labs/modal-client/pull/2797"),
    "smi-v100": _read(
        "nvidia-smi on 2x V100, driver 570.211.01; drivers before 510 show 16160",
        "https://github.com/1CatAI/1Cat-vLLM/issues/85",
    ),
    "smi-a10": _read(
        "nvidia-smi on g5 instances, public logs; an A10 shows the same",
        "https://github.com/modal-labs/modal-client/pull/2797",
    ),
    "smi-b200": _read("nvidia-smi on 8x B200, driver 580.95.05", "https://github.com/NVIDIA/TensorRT-LLM/issues/10278"),
    "smi-4090": _read("nvidia-smi on 4x RTX 4090", "https://github.com/vllm-project/vllm/issues/7553"),
    "smi-5090": _read("nvidia-smi on 2x RTX 5090", "https://github.com/noonghunna/club-3090/issues/1229"),
    "smi-mi300x": _read("rocm-smi: 206141652992 bytes", "https://github.com/ROCm/legacy-rocm-build/issues/4750"),
    "smi-mi325x": _read(
        "amd-smi in AMD's guide for JAX",
        "https://rocm.docs.amd.com/projects/install-on-linux/en/latest/install/3rd-party/jax-install.html",
    ),
    "smi-mi355x": _read(f"rocm-smi (309220868096 bytes) and amd-smi, {_PUBLIC_LOGS}"),
    "smi-logs": _read(f"nvidia-smi, {_PUBLIC_LOGS}"),
    # ---- read from CUDA: "total capacity of" in torch's out-of-memory messages, or device properties
    "cuda-b200": _read(
        "torchao: CUDA's properties of a B200 (178.35 GiB, 7680 bits at 3996 MHz)",
        "https://github.com/pytorch/ao/pull/4002",
    ),
    "cuda-a10": _read(
        "total in torch's out-of-memory messages on an A10, driver 580.95.05; others of 24 GB: 22.03 to 22.15"
    ),
    "cuda-l4": _read("total in torch's out-of-memory messages on an L4, driver 580.95.05"),
    "cuda-a6000": _read(
        "total in torch's out-of-memory messages on an RTX A6000, public logs; others of 48 GB: 47.40 to 47.53"
    ),
    "cuda-h20": _read(
        "torch's properties of an H20 in public code: 97285 MB; an issue has 95.1 GiB",
        "https://github.com/RightNow-AI/AutoMegaKernel/pull/3",
    ),
    "cuda-a100-40": _read(
        "CUDA deviceQuery: 42405855232 bytes",
        "https://upb-pc2.atlassian.net/wiki/spaces/PC2DOK/pages/1900609/NVIDIA+A100+40GB+with+NVLINK",
    ),
    "cuda-logs": _read(f"total in torch's out-of-memory messages, {_PUBLIC_LOGS}"),
    "cuda-as-a100": Source("derived: nvidia-smi shows as much as on the A100 SXM"),
    "cuda-as-h100": Source("derived: nvidia-smi shows as much as on the H100 SXM"),
    "cuda-as-h200": Source("derived: nvidia-smi shows as much as on the H200"),
}
