"""vLLM's names: URL paths, metrics, log lines, defaults.

All hold for 0.24.0 and 0.32.0 unless a line says otherwise: tests/contract/test_vllm_names.py looks for each in
vLLM's source. What kervan uses of vLLM's Python is in `kervan.fleet.vllm`.
"""

import re

# ---- URL paths of the OpenAI server

COMPLETIONS_PATH = "/v1/completions"
CHAT_PATH = "/v1/chat/completions"
MODELS_PATH = "/v1/models"
RESPONSES_PATH = "/v1/responses"
TOKENIZE_PATH = "/tokenize"
DETOKENIZE_PATH = "/detokenize"
# POSTs about requests that one gateway has, or a cache of its own: all gateways must have them.
GATEWAYS_OWN_PATHS = frozenset({"/abort_requests", "/inference/v1/abort_requests", "/reset_mm_cache"})
# It would start data-parallel engines of vLLM's own.
SCALE_PATH = "/scale_elastic_ep"
# FastAPI's pages of the API, and with enable_offline_docs their files.
DOCS_PATHS = frozenset({"/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"})
DOCS_FILES = "/static/swagger-ui"

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

# ---- how vLLM's parser reads lists and switches; all other lists follow their option as words

JSON_LIST_ARGUMENTS = frozenset({"allowed_origins", "allowed_methods", "allowed_headers"})
REPEATED_ARGUMENTS = frozenset({"middleware"})  # the option once for each item
SWITCH_ARGUMENTS = frozenset(  # have no `--no-` form
    {"aggregate_engine_logging", "data_parallel_multi_port_external_lb", "disable_log_stats"}
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

# ---- arguments of the server: fields of EngineArgs, AsyncEngineArgs, BaseFrontendArgs, FrontendArgs in 0.24 to 0.33.
# Those that kervan decides itself are in kervan.config.engine_arguments.

# What a plan and a twin count.
COUNTED_ARGUMENTS = frozenset(
    {
        "dtype", "enable_prefix_caching", "gpu_memory_utilization", "kv_cache_dtype", "max_model_len",
        "max_num_batched_tokens", "max_num_seqs", "quantization",
    }
)  # fmt: skip
# What changes neither the memory nor the speed that a plan is about: names, logs, loading, media, API.
HARMLESS_ARGUMENTS = frozenset(
    {
        "aggregate_engine_logging", "allow_credentials", "allow_deprecated_quantization", "allowed_headers",
        "allowed_local_media_path", "allowed_media_domains", "allowed_methods", "allowed_origins",
        "anthropic_disabled_thinking_effort", "calculate_kv_scales", "chat_template",
        "chat_template_content_format", "code_revision", "cohere_format", "cohere_is_reasoning_model",
        "config_format", "cpu_distributed_timeout_seconds", "cudagraph_metrics", "custom_histogram_buckets",
        "data_parallel_supervisor_port", "default_chat_template_kwargs", "disable_access_log_for_endpoints",
        "disable_chunked_mm_input", "disable_fastapi_docs", "disable_log_stats", "disable_uvicorn_access_log",
        "distributed_timeout_seconds", "download_dir", "dp_supervisor_probe_failure_threshold",
        "dp_supervisor_probe_interval_s", "dp_supervisor_probe_timeout_s", "enable_auto_tool_choice",
        "enable_flash_late_interaction", "enable_force_include_usage", "enable_log_deltas", "enable_log_outputs",
        "enable_log_requests", "enable_logging_iteration_details", "enable_mfu_metrics", "enable_mm_embeds",
        "enable_mm_processor_stats", "enable_offline_docs", "enable_per_request_metrics", "enable_prompt_embeds",
        "enable_prompt_tokens_details", "enable_request_id_headers", "enable_scale_out",
        "enable_server_load_tracking", "enable_ssl_refresh", "enable_tokenizer_info_endpoint",
        "exclude_tools_when_tool_choice_none", "fail_on_environ_validation", "fingerprint_mode",
        "fingerprint_value", "generation_config", "grpc_port", "h11_max_header_count",
        "h11_max_incomplete_event_size", "hf_token", "ignore_patterns", "interleave_mm_strings", "jit_monitor_mode",
        "jit_monitor_verbose", "kv_cache_metrics", "kv_cache_metrics_sample", "kv_events_config", "load_format",
        "log_config_file", "log_error_stack", "log_level", "logging_config", "logprobs_mode", "max_log_len",
        "max_logprobs", "max_parallel_loading_workers", "media_io_kwargs", "middleware", "mm_device_do_normalize",
        "mm_encoder_attn_backend", "mm_encoder_attn_dtype", "mm_encoder_fp8_scale_path",
        "mm_encoder_fp8_scale_save_margin", "mm_encoder_fp8_scale_save_path", "mm_hasher_algorithm",
        "mm_processor_cache_gb", "mm_processor_cache_type", "mm_processor_kwargs",
        "mm_shm_cache_max_object_size_mb", "mm_tensor_ipc", "model_loader_extra_config", "model_weights",
        "numa_bind", "numa_bind_cpus", "numa_bind_nodes", "otlp_traces_endpoint", "override_generation_config",
        "per_request_spec_decode_metrics", "prefix_cache_retention_interval", "prefix_caching_hash_algo",
        "prefix_match_unit", "profiler_config", "pt_load_map_location", "reasoning_config",
        "reasoning_effort_map", "reasoning_parser",
        "reasoning_parser_plugin", "response_role", "return_tokens_as_token_ids", "safetensors_load_strategy",
        "safetensors_prefetch_block_size", "safetensors_prefetch_num_threads", "seed", "served_model_name",
        "show_hidden_metrics_for_version", "shutdown_timeout", "skip_tokenizer_init", "sse_keep_alive_interval",
        "ssl_ca_certs", "ssl_cert_reqs", "ssl_ciphers", "structured_outputs_config", "tokenizer", "tokenizer_mode",
        "tokenizer_revision", "tokens_only", "tool_call_parser", "tool_parser_plugin", "tool_server",
        "tool_strict_level", "trust_remote_code", "trust_request_chat_template", "trust_request_mm_kwargs",
        "use_tqdm_on_load", "uvicorn_log_level", "video_pruning_method", "video_pruning_rate",
        "watchdog_config",
    }
)  # fmt: skip
# What changes them and is not counted, each with the value that is like leaving it out: vLLM's default, as text.
UNCOUNTED_ARGUMENTS = {
    "additional_config": "", "all2all_backend": "allgather_reducescatter", "async_scheduling": "true",
    "attention_backend": "", "attention_config": "", "aux_output_config": "", "block_size": "16",
    "collect_detailed_traces": "", "compilation_config": "", "convert": "auto",
    "cp_kv_cache_interleave_size": "", "cpu_offload_gb": "0", "cpu_offload_params": "",
    "cudagraph_capture_sizes": "", "data_parallel_multi_port_external_lb": "false",
    "dbo_decode_token_threshold": "32", "dbo_prefill_token_threshold": "512", "dcp_comm_backend": "",
    "dcp_kv_cache_interleave_size": "1", "dcp_q_replicate": "", "decode_context_parallel_size": "1",
    "default_mm_loras": "", "device_ids": "", "diffusion_config": "", "disable_cascade_attn": "",
    "disable_custom_all_reduce": "false", "disable_hybrid_kv_cache_manager": "false",
    "disable_nccl_for_dp_synchronization": "", "disable_sliding_window": "false", "dp_sync_interval": "16",
    "ec_manager_config": "", "ec_transfer_config": "", "elastic_ep_max_dp_size": "",
    "enable_batch_sharded_sampling": "", "enable_chunked_prefill": "true",
    "enable_cumem_allocator": "false", "enable_dbo": "false", "enable_elastic_ep": "false",
    "enable_ep_weight_filter": "false", "enable_eplb": "false", "enable_fault_tolerance": "false",
    "enable_flashinfer_autotune": "true", "enable_hc_sp": "false", "enable_layerwise_nvtx_tracing": "false",
    "enable_lora": "false", "enable_mamba_cache_stochastic_rounding": "false",
    "enable_mamba_shared_prefix_checkpoint": "false", "enable_mixed_moe_lora_format": "false",
    "enable_moe_shared_loras": "false", "enable_nccl_comm_suspend": "false",
    "enable_return_routed_experts": "false", "enable_shm_tensor_arena": "false",
    "enable_sleep_mode": "false", "enable_tower_connector_lora": "false", "enable_trace_replay": "false",
    "enforce_eager": "false", "engram_config": "", "eplb_config": "", "expert_placement_strategy": "linear",
    "fault_tolerance_config": "", "fully_sharded_loras": "false", "gdn_prefill_backend": "",
    "hf_config_path": "", "hf_overrides": "", "io_processor_plugin": "", "ir_op_priority": "",
    "kda_decode_backend": "", "kda_prefill_backend": "", "kernel_config": "",
    "kv_cache_dtype_skip_layers": "", "kv_cache_memory_bytes": "", "kv_offloading_backend": "native",
    "kv_offloading_size": "", "kv_sharing_fast_prefill": "false", "kv_transfer_config": "",
    "language_model_only": "false", "limit_mm_per_prompt": "", "linear_backend": "auto",
    "logits_processors": "", "long_prefill_token_threshold": "0",
    "long_prefill_token_threshold_adaptive": "false", "lora_dtype": "auto", "lora_modules": "",
    "lora_target_modules": "", "mamba_backend": "triton", "mamba_block_size": "",
    "mamba_cache_dtype": "auto", "mamba_cache_mode": "none", "mamba_cache_philox_rounds": "0",
    "mamba_config": "", "mamba_ssm_cache_dtype": "auto", "mamba_ssu_algorithm": "", "max_cpu_loras": "",
    "max_cudagraph_capture_size": "", "max_long_partial_prefills": "1", "max_lora_cls_labels": "",
    "max_lora_rank": "16", "max_loras": "1", "max_num_active_seqs": "", "max_num_partial_prefills": "1",
    "max_num_queued_reqs": "", "max_num_queued_tokens": "", "max_num_scheduled_tokens": "",
    "mm_encoder_only": "false", "mm_encoder_tp_mode": "weights", "mm_ipc_gpu_memory_gb": "0",
    "mm_processor_device": "auto", "model_class_overrides": "", "model_impl": "auto", "moe_backend": "auto",
    "monokernel": "false",
    "num_gpu_blocks_override": "", "offload_backend": "auto", "offload_group_size": "0",
    "offload_num_in_group": "1", "offload_params": "", "offload_prefetch_step": "1",
    "optimization_level": "2", "override_attention_dtype": "", "performance_mode": "balanced",
    "pooler_config": "", "prefill_context_parallel_size": "1", "prefill_schedule_interval": "1",
    "quantization_config": "", "ray_workers_use_nsight": "false", "renderer_num_workers": "1",
    "replayssm_buffer_len": "16", "return_sampling_mask": "false", "revision": "main", "runner": "auto",
    "scheduler_cls": "", "scheduler_reserve_full_isl": "true", "scheduling_policy": "fcfs",
    "skip_mm_profiling": "false", "sleep_mode_backend": "cumem", "sleep_mode_offload_cudagraph": "false",
    "sleep_preserve_parameter_names": "", "sparse_indexer_topk_backend": "auto", "spec_method": "",
    "spec_model": "", "spec_tokens": "", "specialize_active_lora": "false", "speculative_config": "",
    "stream_interval": "1", "swa_bounded_replay": "true", "ubatch_size": "0", "use_fp64_gumbel": "false",
    "use_replayssm": "false", "watermark": "0.0", "watermark_config": "", "weight_transfer_config": "",
    "worker_cls": "auto", "worker_extension_cls": "",
}  # fmt: skip
