"""vLLM's names: URL paths, metrics, log lines, defaults.

All hold for 0.24.0 and 0.32.0 unless a line says otherwise: tests/contract/test_vllm_surface.py looks for each in
vLLM's source. What kervan uses of vLLM's Python is in `kervan.fleet.vllm`.
"""

import re

# ---- URL paths of the OpenAI server

COMPLETIONS_PATH = "/v1/completions"
CHAT_PATH = "/v1/chat/completions"
MODELS_PATH = "/v1/models"
TOKENIZE_PATH = "/tokenize"
DETOKENIZE_PATH = "/detokenize"

# POSTs that make the engine work: these, and all below these prefixes that do not end like one of the suffixes.
WORK_PATHS = frozenset({"/pooling", "/classify", "/score", "/rerank", "/generative_scoring", "/invocations"})
WORK_PREFIXES = ("/v1/", "/v2/", "/inference/", "/cohere/")  # 0.24 has nothing below /cohere/
IDLE_SUFFIXES = (
    "/cancel",
    "/abort_requests",
    "/render",
    "/derender",
    "/count_tokens",
    "/tokenize",
    "/detokenize",
    "/models",
    "/load_lora_adapter",
    "/unload_lora_adapter",
)

# ---- Prometheus metrics

REQUESTS_RUNNING = "vllm:num_requests_running"
REQUESTS_WAITING = "vllm:num_requests_waiting"
REQUESTS_WAITING_BY_REASON = "vllm:num_requests_waiting_by_reason"
KV_CACHE_USAGE = "vllm:kv_cache_usage_perc"
CACHE_CONFIG = "vllm:cache_config_info"
ENGINE_SLEEP_STATE = "vllm:engine_sleep_state"

# ---- lines of an engine's log

# Of each worker: GiB of weights on its GPU, and seconds.
WEIGHTS_LINE = re.compile(r"Model loading took (?P<gib>[\d.]+) GiB.* (?P<seconds>[\d.]+) seconds")
# Of each worker with a GPU, GiB.
KV_CACHE_LINE = re.compile(r"Available KV cache memory: (?P<gib>[\d.]+) GiB")
KV_TOKENS_LINE = re.compile(r"(?:GPU|CPU) KV cache size: (?P<tokens>[\d,]+) tokens")
# Of each worker that captures CUDA graphs: seconds, and GiB, which may be below 0.
GRAPHS_LINE = re.compile(r"Graph capturing finished in (?P<seconds>[\d.]+) secs, took (?P<gib>-?[\d.]+) GiB")
UTILIZATION_LINE = re.compile(r"current --gpu-memory-utilization=(?P<share>[\d.]+)")
# Seconds; with `compiling` of which, if anything was compiled.
INIT_LINE = re.compile(
    r"init engine \(profile, create kv cache, warmup model\) took (?P<seconds>[\d.]+) s"
    r"(?: \(compilation: (?P<compiling>[\d.]+) s)?"
)

# ---- defaults

# Share of a GPU's memory.
GPU_MEMORY_UTILIZATION = 0.92
# Architectures that 0.24 serves with its model runner V2, all others with V1; 0.32 decides without such a list.
RUNNER_V2_ARCHITECTURES = frozenset(
    {
        "DeepseekV2ForCausalLM", "GraniteMoeForCausalLM", "LlamaForCausalLM", "MistralForCausalLM",
        "Qwen2MoeForCausalLM", "Qwen3ForCausalLM",
    }
)  # fmt: skip
# Compute capabilities that the wheels have no kernels for: CUDA 13 has no Volta. Source: `VLLM_MAIN_CUDA_VERSION`.
UNSERVED_CAPABILITIES = frozenset({"7.0"})
# The last version with an architecture that newer ones do not serve; source: `_PREVIOUSLY_SUPPORTED_MODELS` of 0.32.
REMOVED_ARCHITECTURES = {
    "ArcticForCausalLM": "0.28.0", "AquilaForCausalLM": "0.24.0", "BaiChuanForCausalLM": "0.23.0",
    "BaichuanForCausalLM": "0.23.0", "BambaForCausalLM": "0.23.0", "Dots1ForCausalLM": "0.23.0",
    "Grok1ForCausalLM": "0.24.0", "Grok1ModelForCausalLM": "0.24.0", "InternLMForCausalLM": "0.23.0",
    "JAISLMHeadModel": "0.22.0", "MPTForCausalLM": "0.28.0", "MiniMaxForCausalLM": "0.23.0",
    "MiniMaxM1ForCausalLM": "0.23.0", "MiniMaxText01ForCausalLM": "0.23.0", "MptForCausalLM": "0.28.0",
    "OuroForCausalLM": "0.26.0", "PersimmonForCausalLM": "0.25.0", "Phi3SmallForCausalLM": "0.9.2",
    "Phi4FlashForCausalLM": "0.10.2", "Plamo2ForCausalLM": "0.26.0", "QWenLMHeadModel": "0.23.0",
    "RWForCausalLM": "0.28.0", "TeleChatForCausalLM": "0.25.0", "XverseForCausalLM": "0.23.0",
}  # fmt: skip
