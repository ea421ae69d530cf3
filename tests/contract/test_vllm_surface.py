"""What kervan relies on inside vLLM, in the source of each release at hand (`harness/vllm_sources.py`).

Source is read without importing, so that a tree whose compiled parts do not load here can be checked.
"""

import ast
import re
from pathlib import Path

import pytest
from harness.places import REPOSITORY
from harness.vllm_sources import (
    attributes_of,
    attributes_set,
    definition,
    fields,
    members,
    parameters,
    parsed,
    required,
    routes,
)

import kervan

ADAPTER = Path(kervan.__file__).parent / "fleet" / "vllm"

# ---- the engine process (kervan.fleet.vllm)


def test_a_model_class_is_looked_at_through_one_function(tree: Path) -> None:
    """`head_start` runs it in place; what was found is kept on disk."""
    path = "model_executor/models/registry.py"
    assert parameters(definition(tree, path, "_run_in_subprocess")) == ["fn"]
    look = ast.unparse(definition(tree, path, "_LazyRegisteredModel", "inspect_model_cls"))
    assert "_run_in_subprocess(lambda: " in look
    assert "_save_modelinfo_to_cache" in look


@pytest.mark.parametrize(
    ("owner", "method", "names"),
    [
        (
            "EngineCoreProc",
            "_perform_handshakes",
            ["self", "handshake_address", "identity", "local_client", "vllm_config", "client_handshake_address"],
        ),
        (
            "EngineCoreProc",
            "process_input_sockets",
            ["self", "input_addresses", "coord_input_address", "identity", "ready_event"],
        ),
        (
            "EngineCoreProc",
            "process_output_sockets",
            ["self", "output_paths", "coord_output_path", "engine_index"],
        ),
        ("EngineCoreProc", "_process_engine_step", ["self"]),
        ("EngineCoreProc", "has_work", ["self"]),
        ("EngineCoreProc", "run_busy_loop", ["self"]),
        ("EngineCoreProc", "_handle_request_preproc_error", ["self", "request"]),
        ("EngineCoreProc", "_send_engine_dead", ["self"]),
        ("EngineCore", "preprocess_add_request", ["self", "request"]),
        ("EngineCore", "get_supported_tasks", ["self"]),
        ("EngineCore", "shutdown", ["self"]),
    ],
)
def test_engine_methods(tree: Path, owner: str, method: str, names: list[str]) -> None:
    assert parameters(definition(tree, "v1/engine/core.py", owner, method)) == names


def test_the_engine_is_made_with_the_arguments_that_kervan_gives(tree: Path) -> None:
    init = definition(tree, "v1/engine/core.py", "EngineCoreProc", "__init__")
    given = {"vllm_config", "local_client", "handshake_address", "executor_class", "log_stats", "engine_index"}
    assert given <= set(parameters(init))
    assert set(required(init)) - {"self"} <= given


def test_the_engine_has_the_queues_that_kervans_socket_threads_use(tree: Path) -> None:
    init = definition(tree, "v1/engine/core.py", "EngineCoreProc", "__init__")
    assert {"input_queue", "output_queue", "shutdown_state"} <= attributes_set(init)
    core_init = definition(tree, "v1/engine/core.py", "EngineCore", "__init__")
    assert {"scheduler", "aborts_queue", "vllm_config"} <= attributes_set(core_init)
    assert "ENGINE_CORE_DEAD" in members(definition(tree, "v1/engine/core.py", "EngineCoreProc"))


def test_the_engine_starts_both_socket_threads_and_waits_for_the_input_only(tree: Path) -> None:
    """`_begin_session` waits for the output socket itself."""
    init = definition(tree, "v1/engine/core.py", "EngineCoreProc", "__init__")
    targets = [
        ast.unparse(keyword.value)
        for call in ast.walk(init)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "threading.Thread"
        for keyword in call.keywords
        if keyword.arg == "target"
    ]
    assert targets == ["self.process_input_sockets", "self.process_output_sockets"]


def test_the_engine_gets_its_addresses_from_a_context_manager(tree: Path) -> None:
    init = definition(tree, "v1/engine/core.py", "EngineCoreProc", "__init__")
    contexts = [ast.unparse(item.context_expr) for n in ast.walk(init) if isinstance(n, ast.With) for item in n.items]
    assert any(context.startswith("self._perform_handshakes(") for context in contexts)
    addresses = definition(tree, "v1/engine/utils.py", "EngineZmqAddresses")
    without_default = [n.target for n in addresses.body if isinstance(n, ast.AnnAssign) and n.value is None]
    assert [ast.unparse(target) for target in without_default] == ["inputs", "outputs"]


def test_steps_of_the_busy_loop_pass_through_the_method_that_kervan_counts(tree: Path) -> None:
    loop = definition(tree, "v1/engine/core.py", "EngineCoreProc", "run_busy_loop")
    assert "_process_engine_step" in set(attributes_of(loop, "self"))


@pytest.mark.parametrize("step", ["step", "step_with_batch_queue"])
def test_a_step_asks_the_scheduler_before_and_after_it_where_kervan_takes_its_time(tree: Path, step: str) -> None:
    function = definition(tree, "v1/engine/core.py", "EngineCore", step)
    calls = {ast.unparse(call.func): call for call in ast.walk(function) if isinstance(call, ast.Call)}
    assert "self.scheduler.schedule" in calls
    assert ast.unparse(calls["self.scheduler.update_from_output"].args[0]) == "scheduler_output"
    output = definition(tree, "v1/core/sched/output.py", "SchedulerOutput")
    assert "total_num_scheduled_tokens" in fields(output)


def test_a_stop_request_ends_the_busy_loop(tree: Path) -> None:
    assert "REQUESTED" in members(definition(tree, "v1/engine/core.py", "EngineShutdownState"))
    source = ast.unparse(definition(tree, "v1/engine/core.py", "EngineCoreProc"))
    assert "EngineShutdownState.REQUESTED" in source


OVERRIDDEN = {
    "__init__",
    "_perform_handshakes",
    "_process_engine_step",
    "process_input_sockets",
    "process_output_sockets",
}


def functions(class_: ast.ClassDef) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in class_.body if isinstance(node, ast.FunctionDef)}


def test_kervans_engine_overrides_what_it_means_to_and_nothing_else(tree: Path) -> None:
    ours = next(
        node
        for node in parsed(ADAPTER / "replica.py").body
        if isinstance(node, ast.ClassDef) and node.name == "FleetEngineCore"
    )
    theirs = [definition(tree, "v1/engine/core.py", name) for name in ("EngineCore", "EngineCoreProc")]
    their_functions = functions(theirs[0]) | functions(theirs[1])
    their_attributes = {name for class_ in theirs for f in functions(class_).values() for name in attributes_set(f)}
    assert functions(ours).keys() & their_functions.keys() == OVERRIDDEN
    for name in ("process_input_sockets", "process_output_sockets", "_process_engine_step"):
        assert parameters(functions(ours)[name]) == parameters(their_functions[name])
    our_attributes = {name for f in functions(ours).values() for name in attributes_set(f)}
    assert our_attributes & (their_attributes | their_functions.keys()) == {"shutdown_state"}
    assert functions(ours).keys() & their_attributes == set()


# ---- the structs on the wire


@pytest.mark.parametrize(
    ("struct", "names"),
    [
        (
            "EngineCoreRequest",
            [
                "request_id",
                "prompt_token_ids",
                "mm_features",
                "sampling_params",
                "pooling_params",
                "arrival_time",
                "lora_request",
                "cache_salt",
                "data_parallel_rank",
                "prompt_embeds",
                "client_index",
                "resumable",
            ],
        ),
        ("EngineCoreOutput", ["request_id", "new_token_ids", "finish_reason", "prefill_stats"]),
        (
            "EngineCoreOutputs",
            ["engine_index", "outputs", "scheduler_stats", "timestamp", "utility_output", "finished_requests"],
        ),
        ("UtilityOutput", ["call_id", "failure_message", "result"]),
    ],
)
def test_struct_fields(tree: Path, struct: str, names: list[str]) -> None:
    class_ = definition(tree, "v1/engine/__init__.py", struct)
    assert set(names) <= set(fields(class_))
    assert "msgspec.Struct" in [ast.unparse(base) for base in class_.bases]


@pytest.mark.parametrize(
    ("enumeration", "names"),
    [("EngineCoreRequestType", ["ADD", "ABORT", "UTILITY", "WAKEUP"]), ("FinishReason", ["ERROR"])],
)
def test_enumerations(tree: Path, enumeration: str, names: list[str]) -> None:
    assert set(names) <= set(members(definition(tree, "v1/engine/__init__.py", enumeration)))


def test_request_kinds_are_one_byte_so_that_kervans_words_differ(tree: Path) -> None:
    kinds = definition(tree, "v1/engine/__init__.py", "EngineCoreRequestType")
    values = [ast.literal_eval(node.value) for node in kinds.body if isinstance(node, ast.Assign)]
    assert values
    assert all(isinstance(value, bytes) and len(value) == 1 for value in values)


def test_a_utility_call_is_index_id_method_and_arguments(tree: Path) -> None:
    source = ast.unparse(definition(tree, "v1/engine/core.py", "EngineCoreProc", "_handle_client_request"))
    assert "client_idx, call_id, method_name, args = request" in source.replace("(", "").replace(")", "")


def test_the_scheduler_reports_the_load_that_kervan_shows(tree: Path) -> None:
    stats = fields(definition(tree, "v1/metrics/stats.py", "SchedulerStats"))
    assert {"num_running_reqs", "num_waiting_reqs", "kv_cache_usage"} <= set(stats)


# ---- resume (kervan.fleet.vllm.resume, .runner_v1)


def test_what_a_prefix_depends_on_is_where_kervan_reads_it(tree: Path) -> None:
    assert "num_local_cached_tokens" in fields(definition(tree, "v1/metrics/stats.py", "PrefillStats"))
    assert {"identifier", "mm_position"} <= set(
        fields(definition(tree, "multimodal/inputs.py", "MultiModalFeatureSpec"))
    )
    assert {"lora_name", "lora_path"} <= set(fields(definition(tree, "lora/request.py", "LoRARequest")))
    for file, params in (("sampling_params.py", "SamplingParams"), ("pooling_params.py", "PoolingParams")):
        assert "skip_reading_prefix_cache" in fields(definition(tree, file, params))
    hashing = (tree / "vllm/v1/core/kv_cache_utils.py").read_text()
    extra = set(re.findall(r"def (_gen_\w+_extra_hash_keys)", hashing))
    assert extra == {"_gen_mm_extra_hash_keys", "_gen_lora_extra_hash_keys", "_gen_prompt_embeds_extra_hash_keys"}


def test_requests_take_generated_tokens_in_the_way_that_resume_gives_them(tree: Path) -> None:
    append = definition(tree, "v1/request.py", "Request", "append_output_token_ids")
    assert parameters(append) == ["self", "token_ids"]
    told = ast.unparse(append)
    assert "self._output_token_ids.extend" in told
    assert "self._all_token_ids.extend" in told
    assert "self.update_block_hashes()" in told
    init = definition(tree, "v1/request.py", "Request", "__init__")
    assert {"prefill_stats", "stop_reason", "status", "structured_output_request"} <= attributes_set(init)
    assert "FINISHED_LENGTH_CAPPED" in members(definition(tree, "v1/request.py", "RequestStatus"))
    check_stop = definition(tree, "v1/core/sched/utils.py", "check_stop")
    assert parameters(check_stop) == ["request", "max_model_len"]


def test_the_scheduler_leaves_missing_prefill_statistics_alone(tree: Path) -> None:
    schedule = definition(tree, "v1/core/sched/scheduler.py", "Scheduler", "schedule")
    asserting = [
        ast.unparse(node.test)
        for node in ast.walk(schedule)
        if isinstance(node, ast.If) and any("request.num_prompt_tokens" in ast.unparse(n) for n in node.body if isinstance(n, ast.Assert))
    ]  # fmt: skip
    assert len(asserting) == 1
    assert asserting[0].startswith("request.prefill_stats")


def test_the_scheduler_gives_model_runner_v2_all_tokens_of_a_new_request(tree: Path) -> None:
    schedule = definition(tree, "v1/core/sched/scheduler.py", "Scheduler", "schedule")
    calls = [
        [ast.unparse(argument) for argument in node.args]
        for node in ast.walk(schedule)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "NewRequestData.from_request"
    ]
    assert [arguments for arguments in calls if "req._all_token_ids" in arguments]
    add = ast.unparse(definition(tree, "v1/worker/gpu/model_runner.py", "GPUModelRunner", "add_requests"))
    assert "prompt_len" in add
    assert "all_token_ids=new_req_data.prefill_token_ids" in add


def test_a_refusal_is_a_whole_grammar(tree: Path) -> None:
    theirs = functions(definition(tree, "v1/structured_output/backend_types.py", "StructuredOutputGrammar"))
    ours = next(n for n in parsed(ADAPTER / "resume.py").body if isinstance(n, ast.ClassDef) and n.name == "_Refusal")
    assert functions(ours).keys() == theirs.keys()
    for name, function in functions(ours).items():
        assert parameters(function) == parameters(theirs[name])


def test_grammars_are_compiled_into_a_future(tree: Path) -> None:
    init = definition(tree, "v1/structured_output/__init__.py", "StructuredOutputManager", "grammar_init")
    assert "self.executor.submit(self._create_grammar, request)" in ast.unparse(init)
    fields_ = fields(definition(tree, "v1/structured_output/request.py", "StructuredOutputRequest"))
    assert {"_grammar", "reasoning_ended", "reasoner"} <= set(fields_)


def test_a_grammar_is_advanced_with_no_more_of_a_request_than_resume_gives(tree: Path) -> None:
    manager = functions(definition(tree, "v1/structured_output/__init__.py", "StructuredOutputManager"))
    entries = {"accept_tokens"} if "accept_tokens" in manager else {"should_advance", "should_fill_bitmask"}
    used = entries | {"_get_reasoner"} | ({"_get_constraint_bounds", "trim_reasoning_for_advance"} & manager.keys())
    looked_at = {name for function in used for name in attributes_of(manager[function], "request")}
    restoring = next(
        call
        for call in ast.walk(parsed(ADAPTER / "resume.py"))
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "SimpleNamespace"
    )
    assert looked_at <= {keyword.arg for keyword in restoring.keywords}


def test_model_runner_v1_takes_new_requests_in_where_resume_adds_their_tokens(tree: Path) -> None:
    update = definition(tree, "v1/worker/gpu_model_runner.py", "GPUModelRunner", "_update_states")
    told = ast.unparse(update)
    assert "output_token_ids=[]" in told
    assert "self.input_batch.add_request(request)" in told
    assert told.index("output_token_ids=[]") < told.index("self.input_batch.add_request(request)")
    batch = functions(definition(tree, "v1/worker/gpu_input_batch.py", "InputBatch"))
    assert parameters(batch["add_request"]) == ["self", "request"]
    assert {"output_token_ids", "generator"} <= set(attributes_of(batch["add_request"], "request"))
    state = definition(tree, "v1/worker/gpu_input_batch.py", "CachedRequestState")
    assert {"sampling_params", "generator", "output_token_ids"} <= set(fields(state))
    runner = definition(tree, "v1/worker/gpu_model_runner.py", "GPUModelRunner", "__init__")
    assert {"input_batch", "sampler", "device", "is_pooling_model"} <= attributes_set(runner)


def test_model_runner_v1_draws_random_numbers_where_resume_skips_them(tree: Path) -> None:
    assert "topk_topp_sampler" in attributes_set(definition(tree, "v1/sample/sampler.py", "Sampler", "__init__"))
    sampler = functions(definition(tree, "v1/sample/ops/topk_topp_sampler.py", "TopKTopPSampler"))
    for name in ("forward_native", "forward_cpu", "forward_cuda"):
        assert parameters(sampler[name]) == ["self", "logits", "generators", "k", "p"]
    told = ast.unparse(definition(tree, "v1/worker/gpu_model_runner.py", "GPUModelRunner"))
    assert "gen.set_offset(gen.get_offset() - 4)" in told


# ---- profiles (kervan.fleet.vllm.profiling)


def test_a_worker_looks_at_its_profiler_in_each_step(tree: Path) -> None:
    """So one that is put there later works; nothing else is asked of it in a step."""
    step = ast.unparse(definition(tree, "v1/worker/gpu_worker.py", "Worker", "annotate_profile"))
    asked = set(re.findall(r"self\.profiler\.(\w+)", step))
    assert "if not self.profiler:" in step and asked <= {"step", "should_annotate", "annotate_context_manager"}
    execute = ast.unparse(definition(tree, "v1/worker/gpu_worker.py", "Worker", "execute_model"))
    assert "with self.annotate_profile(scheduler_output):" in execute
    assert "execute_model" not in functions(definition(tree, "v1/worker/cpu_worker.py", "CPUWorker"))
    wrapper = definition(tree, "v1/worker/worker_base.py", "WorkerWrapperBase")
    assert "self.worker" in ast.unparse(wrapper)


def test_vllms_profiler_is_made_with_what_kervan_gives(tree: Path) -> None:
    made = definition(tree, "profiler/wrapper.py", "TorchProfilerWrapper", "__init__")
    names = ["self", "profiler_config", "worker_name", "local_rank", "activities", "on_trace_ready"]
    assert parameters(made) == names
    assert "dump_cpu_time_total" in attributes_set(made)
    assert "_running" in attributes_set(definition(tree, "profiler/wrapper.py", "WorkerProfiler", "__init__"))
    config = fields(definition(tree, "config/profiler.py", "ProfilerConfig"))
    wanted = {"profiler", "torch_profiler_dir", "torch_profiler_with_stack", "torch_profiler_use_gzip"}
    assert wanted | {"torch_profiler_dump_cuda_time_total", "ignore_frontend"} <= set(config)


def test_what_a_profile_names_is_there(tree: Path) -> None:
    v1 = functions(definition(tree, "v1/worker/gpu_model_runner.py", "GPUModelRunner"))
    v2 = functions(definition(tree, "v1/worker/gpu/model_runner.py", "GPUModelRunner"))
    assert {"_prepare_inputs", "_model_forward", "_sample", "_bookkeeping_sync"} <= set(v1)
    assert {"prepare_inputs", "sample"} <= set(v2)
    assert "_process_input_queue" in functions(definition(tree, "v1/engine/core.py", "EngineCoreProc"))
    output = ast.unparse(definition(tree, "v1/engine/async_llm.py", "AsyncLLM"))
    assert "output_processor.process_outputs(" in output and "self.renderer" in output
    assert "async def tokenize_prompt_async(" in ast.unparse(definition(tree, "renderers/base.py", "BaseRenderer"))


def test_vllms_server_reads_its_environment_for_each_token(tree: Path) -> None:
    """When it does no more, `frontend.settle_environment` may go."""
    update = ast.unparse(definition(tree, "v1/metrics/stats.py", "IterationStats", "update_from_output"))
    assert "envs.VLLM_" in update
    assert parameters(definition(tree, "envs.py", "enable_envs_cache")) == []
    assert "enable_envs_cache" not in ast.unparse(definition(tree, "v1/engine/async_llm.py", "AsyncLLM"))


def test_every_worker_can_be_given_a_function(tree: Path) -> None:
    rpc = definition(tree, "v1/executor/multiproc_executor.py", "MultiprocExecutor", "collective_rpc")
    assert ast.unparse(next(a.annotation for a in rpc.args.args if a.arg == "method")) == "str | Callable"
    ray = definition(tree, "v1/executor/ray_executor_v2.py", "RayExecutorV2")
    assert [ast.unparse(base) for base in ray.bases] == ["MultiprocExecutor"]


# Every field of a request's sampling parameters was looked at (docs/migration.md); a new one must be, too.
SAMPLING_FIELDS = {
    "n", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "top_k", "min_p",
    "seed", "stop", "stop_token_ids", "ignore_eos", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs",
    "logprob_token_ids", "flat_logprobs", "detokenize", "skip_special_tokens", "spaces_between_special_tokens",
    "include_stop_str_in_output", "output_kind", "skip_clone", "output_text_buffer_length", "_eos_token_id",
    "_all_stop_token_ids", "structured_outputs", "logit_bias", "allowed_token_ids", "extra_args",
    "routed_experts_prompt_start", "bad_words", "_bad_words_token_ids", "skip_reading_prefix_cache",
    "thinking_token_budget", "repetition_detection",
    # since some release after 0.24
    "watermarking", "_watermarking_skipped", "prompt_logprob_token_ids", "prompt_logprob_start", "stream_interval",
    "trace_decode_token_ids",
}  # fmt: skip


def test_no_sampling_parameter_is_new(tree: Path) -> None:
    assert set(fields(definition(tree, "sampling_params.py", "SamplingParams"))) <= SAMPLING_FIELDS


# ---- the frontend (kervan.fleet.vllm.engine_client, .versions, .limits)


def test_the_engine_client_is_made_by_keyword_where_kervan_takes_over(tree: Path) -> None:
    make = definition(tree, "v1/engine/core_client.py", "EngineCoreClient", "make_async_mp_client")
    assert "staticmethod" in [ast.unparse(decorator) for decorator in make.decorator_list]
    init = definition(tree, "v1/engine/async_llm.py", "AsyncLLM", "__init__")
    calls = [
        call
        for call in ast.walk(init)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "EngineCoreClient.make_async_mp_client"
    ]
    assert len(calls) == 1
    assert calls[0].args == []
    keywords = {keyword.arg for keyword in calls[0].keywords}
    assert "vllm_config" in keywords
    assert keywords <= set(parameters(make)) | {"renderer"}


# Elastic expert parallelism and fault tolerance are vLLM's own ways to change an engine; a fleet has others.
UNSUPPORTED = {
    "scale_elastic_ep", "prepare_elastic_ep", "commit_elastic_ep", "handle_fault", "get_status",
    "abort_external_elastic_ep", "get_external_elastic_ep_status",
}  # fmt: skip


def test_the_fleet_answers_all_that_async_llm_asks_its_engine_core(tree: Path) -> None:
    module = parsed(tree / "vllm" / "v1/engine/async_llm.py")
    asked = {*attributes_of(module, "self.engine_core"), *attributes_of(module, "engine_core")}
    assert {"add_request_async", "abort_requests_async", "get_output_async", "shutdown", "resources"} <= asked
    client = next(
        node
        for node in parsed(ADAPTER / "engine_client.py").body
        if isinstance(node, ast.ClassDef) and node.name == "FleetEngineClient"
    )
    methods = {node.name for node in client.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    init = next(node for node in client.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    answered = methods | attributes_set(init)
    assert {name for name in asked - answered - UNSUPPORTED if not name.endswith("_async")} == set()


def test_resources_are_read_for_engine_dead_only(tree: Path) -> None:
    module = parsed(tree / "vllm" / "v1/engine/async_llm.py")
    assert set(attributes_of(module, "self.engine_core.resources")) == {"engine_dead"}


def test_sampling_parameters_are_verified_where_kervan_adds_its_limits(tree: Path) -> None:
    verify = definition(tree, "sampling_params.py", "SamplingParams", "_verify_args")
    assert parameters(verify) == ["self"]
    post_init = definition(tree, "sampling_params.py", "SamplingParams", "__post_init__")
    assert "_verify_args" in set(attributes_of(post_init, "self"))
    definition(tree, "exceptions.py", "VLLMValidationError")


def first_file(tree: Path, *files: str) -> str:
    found = [file for file in files if (tree / "vllm" / file).exists()]
    assert found, f"none of {files} exists"
    return found[0]


@pytest.mark.parametrize(
    ("files", "function", "names"),
    [
        (
            ("entrypoints/launchers/app.py", "entrypoints/openai/api_server.py"),
            "build_app",
            ["args", "supported_tasks", "model_config"],
        ),
        (
            ("entrypoints/launchers/api_server/app_state.py", "entrypoints/openai/api_server.py"),
            "init_app_state",
            ["engine_client", "state", "args", "supported_tasks"],
        ),
        (
            (
                "entrypoints/common/cli_args.py",
                "entrypoints/launchers/cli_args.py",
                "entrypoints/openai/cli_args.py",
            ),
            "make_arg_parser",
            ["parser"],
        ),
        (
            (
                "entrypoints/common/cli_args.py",
                "entrypoints/launchers/cli_args.py",
                "entrypoints/openai/cli_args.py",
            ),
            "validate_parsed_serve_args",
            ["args"],
        ),
    ],
)
def test_openai_app_functions(tree: Path, files: tuple[str, ...], function: str, names: list[str]) -> None:
    assert parameters(definition(tree, first_file(tree, *files), function)) == names


STREAMED = (
    ("entrypoints/openai/chat_completion/serving.py", "OpenAIServingChat", "chat_completion_stream_generator"),
    ("entrypoints/openai/completion/serving.py", "OpenAIServingCompletion", "completion_stream_generator"),
)


@pytest.mark.parametrize(("file", "class_", "method"), STREAMED, ids=["chat", "completions"])
def test_streams_are_written_as_replay_counts_on(tree: Path, file: str, class_: str, method: str) -> None:
    """One event for each output of the engine, and none for one without tokens before all others."""
    methods = {node.name for node in definition(tree, file, class_).body if isinstance(node, ast.AsyncFunctionDef)}
    written = definition(tree, file, class_, f"{method}_raw" if f"{method}_raw" in methods else method)
    text = ast.unparse(written)
    assert "not delta_text and (not " in text
    # 0.33 writes one that is the last all the same, which has an event of its own then.
    assert "and (not previous_num_tokens[i])" in text or "and (not processor.num_output_tokens)" in text
    loop = next(n for n in ast.walk(written) if isinstance(n, ast.AsyncFor))
    (outputs,) = (n for n in loop.body if isinstance(n, ast.For) and ast.unparse(n.iter) == "res.outputs")
    assert sum(isinstance(node, ast.Yield) for node in ast.walk(outputs)) == 1
    if written.name != method:  # 0.33: one event for each of its chunks
        (each,) = (n for n in ast.walk(definition(tree, file, class_, method)) if isinstance(n, ast.AsyncFor))
        assert ast.unparse(each.iter).startswith(f"self.{written.name}(")
        assert sum(isinstance(node, ast.Yield) for node in ast.walk(each)) == 1
    assert "self.engine_client.generate(" in (tree / "vllm" / file).read_text()


def test_answers_are_named_by_a_header_and_outputs_have_what_replay_reads(tree: Path) -> None:
    files = (tree / "vllm" / "entrypoints").rglob("serving.py")
    assert any(".headers.get('X-Request-Id')" in ast.unparse(parsed(path)) for path in files)
    assert {"text", "token_ids", "logprobs", "finish_reason", "stop_reason"} <= set(
        fields(definition(tree, "outputs.py", "CompletionOutput"))
    )
    made = attributes_set(definition(tree, "outputs.py", "RequestOutput", "__init__"))
    assert {"outputs", "finished"} <= made
    assert fields(definition(tree, "v1/engine/__init__.py", "EngineCoreEvent")) == ["type", "timestamp"]


def test_the_app_knows_the_names_of_its_models(tree: Path) -> None:
    models = first_file(tree, "entrypoints/openai/models/serving.py", "entrypoints/openai/serving_models.py")
    made = definition(tree, models, "OpenAIServingModels", "__init__")
    assert {"base_model_paths", "lora_requests"} <= set(attributes_of(made, "self"))
    state = first_file(tree, "entrypoints/launchers/api_server/app_state.py", "entrypoints/openai/api_server.py")
    assert "openai_serving_models" in set(attributes_of(definition(tree, state, "init_app_state"), "state"))


def test_async_llm_is_made_from_a_config(tree: Path) -> None:
    make = definition(tree, "v1/engine/async_llm.py", "AsyncLLM", "from_vllm_config")
    assert {"vllm_config", "usage_context", "enable_log_requests", "disable_log_stats"} <= set(parameters(make))
    definition(tree, "v1/engine/async_llm.py", "AsyncLLM", "get_supported_tasks")


# ---- what vLLM's app keeps between requests (docs/architecture.md)


def test_stored_responses_are_where_kervan_looks(tree: Path) -> None:
    file = "entrypoints/openai/responses/serving.py"
    assert {"enable_store", "response_store"} <= attributes_set(
        definition(tree, file, "OpenAIServingResponses", "__init__")
    )
    create = definition(tree, file, "OpenAIServingResponses", "create_responses")
    assert parameters(create) == ["self", "request", "raw_request"]
    assert "previous_response_id" in fields(
        definition(tree, "entrypoints/openai/responses/protocol.py", "ResponsesRequest")
    )
    assert "request_id" in fields(definition(tree, "entrypoints/openai/responses/protocol.py", "ResponsesRequest"))
    text = (tree / "vllm/entrypoints/openai/responses/protocol.py").read_text()
    assert "id=request.request_id" in text


def test_adapters_are_numbered_and_kept_where_kervan_shares_them(tree: Path) -> None:
    file = "entrypoints/openai/models/serving.py"
    made = attributes_set(definition(tree, file, "OpenAIServingModels", "__init__"))
    assert {"lora_requests", "lora_id_counter"} <= made
    for method, names in (
        ("load_lora_adapter", ["self", "request", "base_model_name"]),
        ("unload_lora_adapter", ["self", "request"]),
        ("resolve_lora", ["self", "lora_name"]),
    ):
        assert parameters(definition(tree, file, "OpenAIServingModels", method)) == names
    text = (tree / "vllm" / file).read_text()
    assert text.count("self.lora_id_counter.inc(1)") == text.count("lora_id_counter") - 1 == 2
    numbered = fields(definition(tree, "lora/request.py", "LoRARequest"))
    assert numbered[:2] == ["lora_name", "lora_int_id"]


def test_cors_is_a_middleware_of_the_app(tree: Path) -> None:
    file = first_file(tree, "entrypoints/serve/middleware/register.py", "entrypoints/openai/api_server.py")
    assert "app.add_middleware(CORSMiddleware, " in ast.unparse(parsed(tree / "vllm" / file))


# Containers of one request, of a stream, or of another program than the server.
PASSING = {
    "BaseMultiModalContentParser", "BeamSearchInstance", "DPSupervisor", "HarmonyContext", "LLM", "NoSignalServer",
    "OpenAIModelRegistry", "ParsableContext", "SSEDecoder", "SimpleContext", "SimpleStreamingEventProcessor",
    "_ActiveBlockState", "_StreamState",
}  # fmt: skip
EMPTY = re.compile(r"(\{\}|\[\]|(dict|set|list|deque|OrderedDict|defaultdict|\w*Counter|\w*Cache)\(.*\))")


def stores(tree: Path) -> set[str]:
    """Attributes that hold a container which is empty at first, of vLLM's server."""
    found = set()
    for file in (tree / "vllm" / "entrypoints").rglob("*.py"):
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.ClassDef) and node.name not in PASSING:
                made = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
                for child in (child for function in made for child in ast.walk(function)):
                    if isinstance(child, ast.Assign | ast.AnnAssign) and child.value is not None:
                        target = child.targets[0] if isinstance(child, ast.Assign) else child.target
                        if ast.unparse(target).startswith("self.") and EMPTY.fullmatch(ast.unparse(child.value)):
                            found.add(ast.unparse(target).removeprefix("self."))
    return found


def test_what_outlives_a_request_is_in_the_table(tree: Path) -> None:
    page = (REPOSITORY / "docs" / "architecture.md").read_text()
    section = page.partition("## State in a gateway\n")[2].partition("\n## ")[0]
    known = set(re.findall(r"`([^`]+)`", section))
    others = {"/generate", "/ready", "/readyz"}  # of other servers than the one that kervan runs
    methods = ("get", "post", "put", "delete", "patch", "websocket", "add_api_route", "api_route", "mount")
    assert set().union(*(routes(tree, method) for method in methods)) - others - known == set()
    assert {"response_store", "lora_requests"} <= stores(tree)
    assert stores(tree) - known == set()
