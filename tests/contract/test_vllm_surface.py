"""What kervan relies on inside vLLM, for the installed release and for each one whose source tree is at hand.

`KERVAN_VLLM_SOURCES`: directories, separated as in PATH, that hold a `vllm` package (an unpacked wheel will do). The
first half reads source without importing, so that a tree whose compiled parts do not load here can be checked; the
second half imports kervan's adapter over each tree in a process of its own.
"""

import ast
import functools
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.places import REPOSITORY

import kervan
from kervan.config.engine_arguments import OWNED
from kervan.fleet.vllm.argument_source import REGISTRIES, Source
from kervan.vendor import vllm_names

ADAPTER = Path(kervan.__file__).parent / "fleet" / "vllm"
IMPORT_TIMEOUT_S = 500.0  # importing vLLM takes 20 to 35 s, and minutes on a machine that does other work too

pytestmark = pytest.mark.timeout(IMPORT_TIMEOUT_S + 60)


def trees() -> list[Path]:
    """Directories that hold a `vllm` package; the installed one first."""
    found = []
    spec = importlib.util.find_spec("vllm")
    if spec is not None and spec.origin is not None:
        found.append(Path(spec.origin).parent.parent)
    extra = [Path(word) for word in os.environ.get("KERVAN_VLLM_SOURCES", "").split(os.pathsep) if word]
    for path in extra:
        assert (path / "vllm" / "__init__.py").is_file(), f"KERVAN_VLLM_SOURCES: {path} holds no vllm package"
    return found + [path for path in extra if path.resolve() not in [f.resolve() for f in found]]


def release(tree: Path) -> str:
    for line in (tree / "vllm" / "_version.py").read_text().splitlines():
        name, _, value = line.partition(" = ")
        if name in ("__version__", "version", "__version__ = version"):
            return str(ast.literal_eval(value.rpartition("= ")[2]))
    return tree.name


TREES = trees()


@pytest.fixture(params=TREES, ids=[release(tree) for tree in TREES], scope="module")
def tree(request: pytest.FixtureRequest) -> Path:
    return request.param


# ---- reading source


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def definition(tree: Path, file: str, *names: str) -> Any:
    """A class or function by its path of names; fails by name."""
    node: Any = parsed(tree / "vllm" / file)
    for name in names:
        kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [child for child in node.body if isinstance(child, kinds) and child.name == name]
        assert found, f"vllm/{file} has no {'.'.join(names)}"
        node = found[-1]
    return node


def parameters(function: ast.FunctionDef) -> list[str]:
    """Names of all parameters; keyword-only ones after "*"."""
    arguments = function.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
    return [*names, *(["*"] if arguments.kwonlyargs else []), *(a.arg for a in arguments.kwonlyargs)]


def required(function: ast.FunctionDef) -> list[str]:
    """Names of the parameters without a default."""
    arguments = function.args
    positional = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
    keywords = [a.arg for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d is None]
    return positional[: len(positional) - len(arguments.defaults)] + keywords


def fields(class_: ast.ClassDef) -> list[str]:
    return [n.target.id for n in class_.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]


def members(class_: ast.ClassDef) -> list[str]:
    """Names of an enumeration."""
    return [t.id for n in class_.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)]


def attributes_set(function: ast.FunctionDef) -> set[str]:
    """`x` of every `self.x = ...` in a function."""
    targets: list[ast.expr] = []
    for node in ast.walk(function):
        targets += node.targets if isinstance(node, ast.Assign) else []
        targets += [node.target] if isinstance(node, ast.AnnAssign) else []
    return {t.attr for t in targets if isinstance(t, ast.Attribute) and ast.unparse(t.value) == "self"}


def attributes_of(node: ast.AST, owner: str) -> Iterator[str]:
    """`x` of every `owner.x`."""
    for child in ast.walk(node):
        if isinstance(child, ast.Attribute) and ast.unparse(child.value) == owner:
            yield child.attr


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


# ---- names that several packages of kervan need (kervan.vendor.vllm_names)


def routes(tree: Path, method: str) -> set[str]:
    """Paths for which vLLM's routers take a method."""
    paths = set()
    for file in (tree / "vllm" / "entrypoints").rglob("*.py"):
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == method:
                owner, path = ast.unparse(node.func.value), node.args[0] if node.args else None
                if owner.endswith(("router", "app")) and isinstance(path, ast.Constant):
                    paths.add(path.value)
    return paths


# POSTs that change or end an engine, which an operator sends.
CONTROL_PATHS = {
    "/ping", "/pause", "/resume", "/sleep", "/wake_up", "/abort_requests", "/collective_rpc", "/scale_elastic_ep",
    "/is_scaling_elastic_ep", "/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache", "/start_profile",
    "/stop_profile", "/init_weight_transfer_engine", "/start_weight_update", "/update_weights", "/finish_weight_update",
    # since some release after 0.24
    "/fault_tolerance/apply", "/release_kv_cache_memory", "/shutdown_weight_transfer_engine",
    "/start_draft_weight_update", "/update_weight_version", "/weight_checker",
}  # fmt: skip


def test_every_post_of_vllm_is_work_or_known_as_none(tree: Path) -> None:
    posts = routes(tree, "post")
    assert posts >= vllm_names.WORK_PATHS
    assert {vllm_names.COMPLETIONS_PATH, vllm_names.CHAT_PATH, vllm_names.TOKENIZE_PATH} <= posts
    assert vllm_names.DETOKENIZE_PATH in posts
    assert vllm_names.MODELS_PATH in routes(tree, "get")
    assert {vllm_names.RESPONSES_PATH, vllm_names.SCALE_PATH} <= posts
    assert vllm_names.GATEWAYS_OWN_PATHS - posts - routes(tree, "add_api_route") <= {"/inference/v1/abort_requests"}
    idle = {path for path in posts if path.endswith(vllm_names.IDLE_SUFFIXES)}
    for suffix in vllm_names.IDLE_SUFFIXES:
        assert suffix in ("/models",) or any(path.endswith(suffix) for path in idle), suffix
    work = {path for path in posts - idle if path.startswith(vllm_names.WORK_PREFIXES)} | vllm_names.WORK_PATHS
    assert posts - idle - work - {"/generate"} <= CONTROL_PATHS  # /generate: of another server in 0.24


@pytest.mark.parametrize(
    "metric",
    [
        vllm_names.REQUESTS_RUNNING,
        vllm_names.REQUESTS_WAITING,
        vllm_names.REQUESTS_WAITING_BY_REASON,
        vllm_names.KV_CACHE_USAGE,
        vllm_names.CACHE_CONFIG,
        vllm_names.ENGINE_SLEEP_STATE,
    ],
)
def test_metrics_have_their_names(tree: Path, metric: str) -> None:
    assert f'"{metric}"' in (tree / "vllm/v1/metrics/loggers.py").read_text()


@pytest.mark.parametrize(
    ("files", "start", "pattern", "groups"),
    [
        (
            ("v1/worker/gpu_model_runner.py", "v1/worker/gpu/model_runner.py"),
            "Model loading took",
            vllm_names.WEIGHTS_LINE,
            {"gib": "1.5", "seconds": "1.5"},
        ),
        (("v1/worker/gpu_worker.py",), "Available KV cache memory", vllm_names.KV_CACHE_LINE, {"gib": "1.5"}),
        (
            ("v1/worker/gpu_model_runner.py", "v1/worker/gpu/model_runner.py"),
            "Graph capturing finished",
            vllm_names.GRAPHS_LINE,
            {"seconds": "1.5", "gib": "1.5"},
        ),
        (("v1/worker/gpu_worker.py",), "CUDA graph memory profiling is enabled", vllm_names.UTILIZATION_LINE, {"share": "1.5"}),
    ],
    ids=["weights", "KV cache", "graphs", "utilization"],
)  # fmt: skip
def test_log_lines_are_read(
    tree: Path, files: tuple[str, ...], start: str, pattern: re.Pattern[str], groups: dict[str, str]
) -> None:
    for file in files:
        for text in logged(tree, file, start):
            match = pattern.search(text)
            assert match is not None, text
            assert match.groupdict() == groups


def test_the_line_of_the_cache_size_is_read(tree: Path) -> None:
    for text in logged(tree, "v1/core/kv_cache_utils.py", ("GPU KV cache size", "%s KV cache size")):
        line = text.replace("1.5 KV", "GPU KV").replace("size: 1.5", "size: 1,024")
        match = vllm_names.KV_TOKENS_LINE.search(line)
        assert match is not None, line
        assert match["tokens"] == "1,024"


def test_the_line_of_an_engines_start_is_read(tree: Path) -> None:
    matches = [
        vllm_names.INIT_LINE.search(text)
        for text in logged(tree, "v1/engine/core.py", "init engine (profile, create kv cache")
    ]
    assert all(match is not None and match["seconds"] == "1.5" for match in matches)
    assert {match["compiling"] for match in matches if match is not None} == {None, "1.5"}


def logged(tree: Path, file: str, start: str | tuple[str, ...]) -> list[str]:
    """The texts in a file that begin so, with 1.5 for each value."""
    nodes = ast.walk(parsed(tree / "vllm" / file))
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    found = [re.sub(r"%(\.\d+)?[sfd]", "1.5", text) for text in texts if text.startswith(start)]
    assert found, f"vllm/{file} logs nothing that begins with {start}"
    return found


def test_the_default_share_of_a_gpu_is_the_one_that_kervan_plans_with(tree: Path) -> None:
    cache = definition(tree, "config/cache.py", "CacheConfig")
    (field,) = (
        n for n in cache.body if isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == "gpu_memory_utilization"
    )
    assert f"default={vllm_names.GPU_MEMORY_UTILIZATION}" in ast.unparse(field)


def test_the_wheels_are_built_with_a_cuda_that_has_no_volta(tree: Path) -> None:
    assert frozenset({"7.0"}) == vllm_names.UNSERVED_CAPABILITIES
    assert re.search(r"VLLM_MAIN_CUDA_VERSION: str = \"13\.", (tree / "vllm/envs.py").read_text())


ARGUMENT_CLASSES = {
    "engine/arg_utils.py": ("EngineArgs", "AsyncEngineArgs"),
    "entrypoints/common/cli_args.py": ("BaseFrontendArgs", "FrontendArgs"),  # 0.33
    "entrypoints/launchers/cli_args.py": ("BaseFrontendArgs", "FrontendArgs"),
    "entrypoints/openai/cli_args.py": ("BaseFrontendArgs", "FrontendArgs"),
}


def arguments_of(tree: Path) -> dict[str, str]:
    """The arguments of a tree's server, with the source of their defaults, which may name a field of a config."""
    found = {}
    for file, names in ARGUMENT_CLASSES.items():
        if not (tree / "vllm" / file).exists():
            continue
        for node in parsed(tree / "vllm" / file).body:
            if isinstance(node, ast.ClassDef) and node.name in names:
                found |= {a.target.id: ast.unparse(a.value) if a.value else "" for a in node.body if is_field(a)}
    return {name: value for name, value in found.items() if not name.startswith("_")}


def is_field(node: ast.stmt) -> bool:
    return isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)


def config_defaults(tree: Path) -> dict[str, str]:
    """`Class.field` of vLLM's configs with the source of its default."""
    return {
        f"{node.name}.{item.target.id}": ast.unparse(item.value)
        for file in (tree / "vllm" / "config").glob("*.py")
        for node in parsed(file).body
        if isinstance(node, ast.ClassDef)
        for item in node.body
        if is_field(item) and item.value is not None
    }


def test_every_argument_is_counted_harmless_refused_or_kervans(tree: Path) -> None:
    kinds = [
        vllm_names.COUNTED_ARGUMENTS, vllm_names.HARMLESS_ARGUMENTS, set(vllm_names.UNCOUNTED_ARGUMENTS), set(OWNED),
    ]  # fmt: skip
    assert set(arguments_of(tree)) - set().union(*kinds) == set()
    assert sum(map(len, kinds)) == len(set().union(*kinds)), "an argument is in two lists"


# Arguments of 0.33, which is published for GPUs only: `make` does not fetch it.
SINCE_0_33 = {"monokernel", "reasoning_effort_map", "sleep_mode_backend", "watchdog_config"}


def test_listed_arguments_are_of_some_release() -> None:
    known = SINCE_0_33.union(*(arguments_of(tree) for tree in TREES))
    if len(TREES) > 1:
        listed = {*vllm_names.COUNTED_ARGUMENTS, *vllm_names.HARMLESS_ARGUMENTS, *vllm_names.UNCOUNTED_ARGUMENTS}
        assert listed - known == set()


def test_uncounted_arguments_have_vllms_defaults(tree: Path) -> None:
    """A wrong value would let a plan pass that does not count it. None and what a release works out are not compared."""
    configs = config_defaults(tree)
    wrong = {}
    for name, default in arguments_of(tree).items():
        listed = vllm_names.UNCOUNTED_ARGUMENTS.get(name)
        source = configs.get(default, default)
        constant = re.match(r"(?:Field\(default=)?(True|False|-?[\d.]+|'[^']*')(?:[,)]|$)", source)
        if listed and constant and str(ast.literal_eval(constant[1])).lower() != listed:
            wrong[name] = (constant[1], listed)
    assert wrong == {}


def test_0_24_serves_the_listed_architectures_with_model_runner_v2(tree: Path) -> None:
    source = parsed(tree / "vllm/config/vllm.py")
    lists = [
        node.value
        for node in source.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "DEFAULT_V2_MODEL_RUNNER_ARCHITECTURES"
    ]
    assert bool(lists) is release(tree).startswith("0.24.")
    for value in lists:
        assert isinstance(value, ast.Call)
        assert ast.literal_eval(value.args[0]) == vllm_names.RUNNER_V2_ARCHITECTURES


# ---- the adapter itself, imported over each tree


def restored_requests() -> dict[str, Any]:
    """What `resume.restore` makes of requests of this vLLM; sent with `probe`."""
    from concurrent.futures import Future
    from types import SimpleNamespace

    from vllm.sampling_params import SamplingParams, StructuredOutputsParams
    from vllm.v1.request import Request
    from vllm.v1.structured_output import StructuredOutputManager

    from kervan.fleet.vllm import resume

    class Grammar:
        """Takes tokens up to 90."""

        def __init__(self) -> None:
            self.taken: list[int] = []

        def is_terminated(self) -> bool:
            return False

        def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
            self.taken += tokens
            return all(token <= 90 for token in tokens)

    class Reasoner:
        """Reasoning ends at token 5."""

        def __init__(self, tokenizer: Any, **more: Any) -> None:
            pass

        def is_reasoning_end(self, tokens: Any) -> bool:
            return 5 in list(tokens)

        def is_reasoning_end_streaming(self, tokens: Any, new: Any) -> bool:
            return 5 in list(new)

    def request(generated: list[int], prompt: tuple[int, ...] = (1, 2, 3), **sampling: Any) -> Any:
        params = SamplingParams(**sampling)
        return Request("r~1", list(prompt), resume.carrying(params, generated) if generated else params, None)

    def look(restored: Any) -> list[Any]:
        return [
            restored.num_prompt_tokens,
            list(restored.output_token_ids),
            list(restored.all_token_ids),
            restored.prefill_stats is None,
            restored.is_finished() and str(restored.get_finished_reason()),
            restored.stop_reason,
        ]

    def ends(generated: list[int], **sampling: Any) -> list[Any]:
        restored = request(generated, **sampling)
        resume.restore(restored, None, 20)
        if restored.is_finished():
            (output,) = resume.ending(restored).outputs
            assert (output.request_id, output.new_token_ids) == ("r~1", [])
            assert output.finish_reason == restored.get_finished_reason()
        return look(restored)

    def grammar(generated: list[int], reasoner: Any, compiled: Any, prompt: tuple[int, ...] = (1, 2, 3)) -> list[Any]:
        manager = object.__new__(StructuredOutputManager)
        manager.reasoner_cls, manager.enable_in_reasoning, manager.tokenizer = reasoner, False, None
        manager.vllm_config = SimpleNamespace(speculative_config=None)
        wanted = StructuredOutputsParams(regex="a*")
        restored = request(generated, prompt, max_tokens=30, structured_outputs=wanted)
        structured = restored.structured_output_request
        future: Any = Future()
        structured.grammar = future
        resume.restore(restored, manager, 100)
        assert structured.grammar is None
        future.set_exception(compiled) if isinstance(compiled, Exception) else future.set_result(compiled)
        got = structured.grammar
        refused = got is not compiled
        if refused:
            assert (got.accept_tokens("r~1", [1]), got.validate_tokens([1]), got.is_terminated()) == (False, [], True)
        return [refused, getattr(compiled, "taken", None), structured.reasoning_ended]

    seen: dict[str, Any] = {
        "goes on": ends([7, 8], max_tokens=10, min_tokens=4),
        "nothing generated": ends([], max_tokens=10),
        "max_tokens": ends([7, 8], max_tokens=2),
        "stop token": ends([7, 8], max_tokens=9, stop_token_ids=[8]),
        "context": ends([7] * 17, max_tokens=900, min_tokens=800),
        "grammar": grammar([7, 8], None, Grammar()),
        "refused": grammar([7, 99, 8], None, Grammar()),
        "not compiled": grammar([7, 8], None, ValueError("no")),
        "reasoning": grammar([7, 8], Reasoner, Grammar()),
        "reasoning ended": grammar([7, 5, 8, 9], Reasoner, Grammar()),
        "no reasoning": grammar([7, 8], Reasoner, Grammar(), (1, 5)),
    }
    try:
        resume.restore(request([], tuple(range(30)), max_tokens=2), None, 20)
    except Exception as error:  # noqa: BLE001 - its text is looked at
        seen["prompt"] = str(error)
    return seen


def argument_readings() -> dict[str, Any]:
    """How kervan's reading of vLLM's arguments differs from vLLM's parser, and what the parser reads of what is written.

    Sent with `probe`.
    """
    import argparse
    from pathlib import Path

    import vllm
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from kervan.config.engine_arguments import to_argv
    from kervan.errors import ConfigError
    from kervan.fleet.vllm import arguments, versions
    from kervan.fleet.vllm.argument_source import REGISTRIES, Source

    source = Source(Path(vllm.__file__).parent)
    parser = versions.cli_args().make_arg_parser(FlexibleArgumentParser(exit_on_error=False))
    kinds = {
        "str": "text", "int": "int", "float": "float", "human_readable_int": "size", "loads": "json",
        "human_readable_int_or_auto": "length", "parse_type.<locals>._parse_type": "json",
        "_compute_kwargs.<locals>.parse_dataclass": "config", "union_dict_and_str": "either", "None": "text",
        "EngineArgs.add_cli_args.<locals>.<lambda>": "text",
    }  # fmt: skip
    actions = {"BooleanOptionalAction": "flag", "_StoreTrueAction": "switch", "_AppendAction": "append"}
    not_options = {"help", "config", "headless", "grpc", "api_server_count"}  # of the command, not of the server
    differences: list[Any] = []
    read_wrong: list[Any] = []
    choices_of: dict[str, list[str]] = {}
    for action in parser._actions:
        for option in action.option_strings:
            name = option.removeprefix("--").replace("-", "_")
            is_flag = isinstance(action, argparse.BooleanOptionalAction)
            is_negation = is_flag and (option.startswith("--no-") or name != action.dest)
            if not option.startswith("--") or is_negation or name in not_options:
                continue
            choices_of[name] = [str(choice) for choice in action.choices or () if choice not in (None, "None")]
            if action.dest != name:  # another name, which kervan refuses
                continue
            if name not in source.names:
                differences.append([name, "not found"])
                continue
            given = source.argument(name)
            kind = type_ = action.type
            if is_optional := getattr(type_, "__qualname__", "") == "optional_type.<locals>._optional_type":
                kind = type_.__closure__[0].cell_contents
            kind = kinds.get(getattr(kind, "__qualname__", str(kind)), "any")
            choices = set(choices_of[name])
            named = "BooleanOptionalAction" if is_flag else type(action).__name__
            wanted = [actions.get(named, "store"), action.nargs, choices, kind, is_optional]
            found = [given.action, given.nargs, set(given.choices) or choices, given.kind, given.is_optional]
            if given.action in ("flag", "switch"):
                wanted[1:], found[1:] = [], []
            elif given.kind == "any":  # told to be unknown
                wanted[3], found[3] = "any", "any"
            if wanted != found:
                differences.append([name, str(wanted), str(found)])

    def samples(given: Any) -> list[Any]:
        """Values with what vLLM's parser makes of each."""
        one: list[Any] = {
            "int": [(3, 3), ("3", 3), (-1, -1)], "float": [(0.5, 0.5), (-0.5, -0.5)], "size": [("4k", 4000), (8, 8)],
            "length": [("4k", 4000), (-1, -1)], "json": [({"a": {"b": [1, "x"]}}, {"a": {"b": [1, "x"]}})],
            "either": [({"a": 1}, {"a": 1}), ("x", "x")], "text": [("x", "x"), ("-x.y", "-x.y"), ("--a_b", "--a_b"), ("a b", "a b")],
            "config": [({}, ...)], "any": [],
        }[given.kind]  # fmt: skip
        if given.fields:
            one = [({}, ... if given.kind == "config" else {})]
        if words := choices_of[given.name]:
            word = words[-1]
            one = [(word, int(word) if given.kind == "int" else word)]
            one += [(word.upper(), word)] if given.is_folded else []
        if given.action == "flag":
            return [(True, True), (False, False)]
        if given.action == "switch":
            return [(True, True), (False, False)]
        if given.name in ("allowed_origins", "allowed_methods", "allowed_headers"):
            return [(["http://a", "-b"], ["http://a", "-b"]), ([], [])]
        if given.name == "lora_modules":
            return [([{"name": "a", "path": "/p"}, "b=/q"], ...), ("a=/p", ...)]
        if given.action == "append":
            return [(["a.B", "-c.D"], ["a.B", "-c.D"]), (["a.B"], ["a.B"]), ("a.B", ["a.B"])]
        if given.nargs == "?":
            return [(True, True), ("x", "x")]
        if given.nargs is not None:
            count = given.nargs if isinstance(given.nargs, int) else 2
            many = [(value, read) for value, read in one if not str(value).startswith("-")]
            lists = [([value] * count, [read] * count) for value, read in many]
            return lists + ([([value], [read]) for value, read in one] if given.nargs == "+" else [])
        return one

    for name in sorted(source.names - {"port"}):
        for value, expected in samples(source.argument(name)):
            try:
                arguments.check({name: value})
            except ConfigError as error:
                if name not in REGISTRIES and "needs" not in str(error):
                    read_wrong.append([name, str(value), f"kervan: {error}"])
            try:
                args = parser.parse_args(to_argv({name: value, "port": 5}))
            except (Exception, SystemExit) as error:  # noqa: BLE001 - told
                read_wrong.append([name, str(value), f"{type(error).__name__}: {error}"])
                continue
            got = getattr(args, name)
            is_same = not isinstance(got, str) if expected is ... else got == expected and type(got) is type(expected)
            if not is_same or args.model_tag is not None or args.port != 5:
                read_wrong.append([name, str(value), str(got)])
    return {
        "differences": differences,
        "not options": sorted(source.names - choices_of.keys()),
        "read wrong": read_wrong,
    }


def probe(model: str) -> dict[str, Any]:
    """Runs in a process of its own, over one vLLM; its source is sent there. Returns what the tests look at."""
    from types import SimpleNamespace

    from vllm.exceptions import VLLMValidationError
    from vllm.pooling_params import PoolingParams
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, EngineCoreRequestType
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    from kervan.config.fleet import FleetConfig
    from kervan.errors import ConfigError
    from kervan.fleet.vllm import codec as codecs
    from kervan.fleet.vllm import engine_client, frontend, limits, replica, resume, versions

    codec = codecs.VllmCodec()
    seen: dict[str, Any] = {"engine_version": codec.engine_version}

    def request(sampling: Any, **more: Any) -> Any:
        return EngineCoreRequest(
            request_id="r",
            prompt_token_ids=[1, 2, 3],
            mm_features=None,
            sampling_params=sampling,
            pooling_params=None if sampling is not None else PoolingParams(task="embed"),
            arrival_time=1.0,
            lora_request=None,
            cache_salt="salt",
            data_parallel_rank=None,
            priority=3,
            trace_headers={"traceparent": "x"},
            **more,
        )

    def arrives(stream: Any) -> dict[str, Any]:
        kind, *frames = codec.encode_add(stream)
        assert kind == EngineCoreRequestType.ADD.value
        got = MsgpackDecoder(EngineCoreRequest).decode([bytes(frame) for frame in frames])
        sampling = got.sampling_params
        return {
            "request_id": got.request_id,
            "prompt": got.prompt_token_ids,
            "max_tokens": sampling and sampling.max_tokens,
            "min_tokens": sampling and sampling.min_tokens,
            "generated": resume.carried(sampling),
            "temperature": sampling and sampling.temperature,
            "stop_token_ids": sampling and sampling.stop_token_ids,
            "kept": [got.arrival_time, got.cache_salt, got.priority, got.trace_headers],
        }

    def moved(generated: list[int], **sampling: Any) -> dict[str, Any]:
        params = SamplingParams(**sampling) if sampling else None
        stream = codec.describe(request(params))
        stream.generated, stream.epoch, stream.wire_id = generated, 1, "r~1"
        after = arrives(stream)
        original = stream.request.sampling_params
        assert stream.request.prompt_token_ids == [1, 2, 3]
        assert original is None or (original.max_tokens, original.extra_args) == (sampling["max_tokens"], None)
        return after

    base = {"max_tokens": 10, "min_tokens": 4, "temperature": 0.0, "stop_token_ids": [99]}
    first = codec.describe(request(SamplingParams(**base)))
    first.wire_id = "r"
    seen["described"] = [first.request_id, first.prompt_tokens, first.max_output_tokens, first.is_movable]
    seen["resumable_is_movable"] = codec.describe(request(SamplingParams(**base), resumable=True)).is_movable
    seen["first"] = arrives(first)
    seen["moved_after_3"] = moved([7, 8, 9], **base)
    seen["moved_after_6"] = moved([7, 8, 9, 7, 8, 9], **base)
    seen["moved_before_a_token"] = moved([], **base)
    seen["moved_pooling"] = moved([])

    kind, *frames = codec.encode_abort(["r", "r~1"])
    seen["abort"] = [kind == EngineCoreRequestType.ABORT.value, MsgpackDecoder().decode([bytes(f) for f in frames])]
    kind, *frames = codec.encode_utility(5, "add_lora", (1, "x"))
    seen["utility"] = [kind == EngineCoreRequestType.UTILITY.value, MsgpackDecoder().decode([bytes(f) for f in frames])]

    step = EngineCoreOutputs(outputs=[EngineCoreOutput(request_id="r~1", new_token_ids=[4, 5])], timestamp=2.5)
    got = codec.decode([bytes(frame) for frame in MsgpackEncoder().encode(step)])
    codec.restore(got.outputs[0], first)
    restored = got.outputs[0]
    seen["step"] = [restored.request_id, list(restored.new_token_ids), got.timestamp, got.utility_output is None]
    seen["restored_prefill_stats"] = restored.prefill_stats
    failure = codec.failure("r")
    seen["failure"] = [failure.outputs[0].request_id, failure.outputs[0].finish_reason.name]

    seen["restored"] = restored_requests()
    seen["runner_limits"] = versions.runner_limits()
    many = {
        "stop_token_ids": {"stop_token_ids": list(range(300)), "min_tokens": 1},
        "allowed_token_ids": {"allowed_token_ids": list(range(1100))},
        "logit_bias": {"logit_bias": dict.fromkeys(range(1100), 1.0)},
        "stop_token_ids without min_tokens": {"stop_token_ids": list(range(300))},
    }

    def broken(entry_limits: dict[str, int]) -> list[str]:
        return [name for name, given in many.items() if limits.violation(SamplingParams(**given), entry_limits)]

    seen["broken on V1"], seen["broken on V2"] = broken({}), broken(seen["runner_limits"])
    limits.install(entry_limits=seen["runner_limits"])
    limits.install(entry_limits=seen["runner_limits"])
    refused = {}
    for name, params in {
        "n": {"n": 129},
        "top_k": {"top_k": 2**31},
        "seed": {"seed": 2**63},
        "logit_bias": {"logit_bias": dict.fromkeys(range(100_000), 1.0)},
        "generated": {"extra_args": {"kervan_generated": [1, 2]}},
        "ok": {"n": 2, "top_k": 5, "seed": 1, "logit_bias": {1: 1.0}},
    }.items():
        try:
            SamplingParams(**params)
        except VLLMValidationError as error:
            refused[name] = str(error)
    seen["refused"] = refused
    late = {}
    for name, params in {
        "end tokens": {"stop_token_ids": list(range(128)), "min_tokens": 1},
        "bad words": {"bad_words": [letter * 100 for letter in "abcdefghijkl"]},
        "ok": {"stop_token_ids": list(range(100)), "min_tokens": 1, "bad_words": ["x" * 100]},
    }.items():
        try:
            sampling = SamplingParams(**params)
            sampling.update_from_generation_config({"eos_token_id": [900, 901]}, 900)
            sampling.update_from_tokenizer(
                SimpleNamespace(encode=lambda text, **_: [*map(ord, text)], max_token_id=999)
            )
        except VLLMValidationError as error:
            late[name] = str(error)
    seen["late"] = late

    config = FleetConfig(model=model, engine_args={"max_model_len": "4k", "enforce_eager": True, "max_num_seqs": 8})
    args = versions.parse_args(config.engine_argv)
    seen["parsed"] = [args.model, args.tensor_parallel_size, args.max_model_len, args.enforce_eager, args.max_num_seqs]
    try:
        versions.parse_args([*config.engine_argv, "--max-num-seqs", "many"])
    except ConfigError as error:
        seen["parse_error"] = str(error)
    try:
        versions.parse_args([*config.engine_argv, "--middleware", "a.B", "b.C"])
    except ConfigError as error:
        seen["stray_word"] = str(error)

    from kervan.fleet.admitted import Admitted, StreamFailure
    from kervan.fleet.vllm import failed_streams

    failed_streams.install()
    failed_streams.install()
    seen["failed"] = []
    ticket = Admitted(lambda: 1).take(1, is_bulk=False)
    for failure in (None, StreamFailure("it took long", is_transient=False), StreamFailure("full", is_transient=True)):
        ticket.failure = failure
        with ticket:
            versions.serving_class()._raise_if_error(None, "stop", "r")
            try:
                versions.serving_class()._raise_if_error(None, "error", "r")
            except Exception as error:  # noqa: BLE001 - its text is looked at
                seen["failed"].append([str(error), int(error.status_code)])  # type: ignore[attr-defined]

    seen["arguments"] = argument_readings()
    seen["struct_is_positional"] = EngineCoreRequest.__struct_config__.array_like
    seen["engine_client"] = engine_client.FleetEngineClient.__name__
    seen["frontend"] = frontend.OpenAIFrontend.__name__
    seen["core_bases"] = [base.__name__ for base in replica.FleetEngineCore.__mro__]
    return seen


@pytest.fixture(scope="module")
def seen(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `probe` saw over `tree`."""
    directory = tmp_path_factory.mktemp("probe")
    result = directory / "seen.json"
    script = directory / "probe.py"
    head = "from __future__ import annotations\nimport json, pathlib, sys\nfrom typing import Any\n"
    tail = "\npathlib.Path(sys.argv[1]).write_text(json.dumps(probe(sys.argv[2])))\n"
    script.write_text(head + "".join(map(inspect.getsource, (restored_requests, argument_readings, probe))) + tail)
    paths = [str(tree), str(Path(kervan.__file__).parent.parent)]
    done = subprocess.run(
        [sys.executable, str(script), str(result), str(directory)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"},
        capture_output=True,
        text=True,
        timeout=IMPORT_TIMEOUT_S,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    loaded: dict[str, Any] = json.loads(result.read_text())
    return loaded


def test_the_adapter_loads_over_this_release(seen: dict[str, Any], tree: Path) -> None:
    assert seen["engine_version"] == release(tree)
    assert seen["core_bases"][:3] == ["FleetEngineCore", "EngineCoreProc", "EngineCore"]
    assert (seen["engine_client"], seen["frontend"]) == ("FleetEngineClient", "OpenAIFrontend")


def test_a_failed_stream_is_told_with_its_reason(seen: dict[str, Any]) -> None:
    assert seen["failed"] == [["Internal server error", 500], ["it took long", 500], ["full", 503]]


def test_structs_are_positional_so_one_fleet_needs_one_release(seen: dict[str, Any]) -> None:
    assert seen["struct_is_positional"] is True


def test_a_request_arrives_as_it_was_sent(seen: dict[str, Any]) -> None:
    assert seen["described"] == ["r", 3, 10, True]
    assert seen["first"] == {
        "request_id": "r",
        "prompt": [1, 2, 3],
        "max_tokens": 10,
        "min_tokens": 4,
        "generated": [],
        "temperature": 0.0,
        "stop_token_ids": [99],
        "kept": [1.0, "salt", 3, {"traceparent": "x"}],
    }


@pytest.mark.parametrize(
    ("case", "generated"),
    [
        pytest.param("moved_after_3", [7, 8, 9], id="after 3 tokens"),
        pytest.param("moved_after_6", [7, 8, 9, 7, 8, 9], id="after min_tokens"),
        pytest.param("moved_before_a_token", [], id="before a token"),
        pytest.param("moved_pooling", [], id="pooling: nothing generated"),
    ],
)
def test_a_moved_request_carries_its_tokens_and_is_else_as_it_was(
    seen: dict[str, Any], case: str, generated: list[int]
) -> None:
    got = seen[case]
    assert (got["request_id"], got["prompt"], got["generated"]) == ("r~1", [1, 2, 3], generated)
    assert got["kept"] == seen["first"]["kept"]
    if case != "moved_pooling":
        assert (got["max_tokens"], got["min_tokens"]) == (10, 4)
        assert (got["temperature"], got["stop_token_ids"]) == (0.0, [99])


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("goes on", [3, [7, 8], [1, 2, 3, 7, 8], True, False, None]),
        ("nothing generated", [3, [], [1, 2, 3], False, False, None]),
        ("max_tokens", [3, [7, 8], [1, 2, 3, 7, 8], True, "length", None]),
        ("stop token", [3, [7, 8], [1, 2, 3, 7, 8], True, "stop", 8]),
        ("context", [3, [7] * 17, [1, 2, 3, *[7] * 17], True, "length", None]),
    ],
)
def test_a_moved_request_counts_its_tokens_as_output(seen: dict[str, Any], case: str, expected: list[Any]) -> None:
    assert seen["restored"][case] == expected


@pytest.mark.parametrize(
    ("case", "refused", "taken", "reasoning_ended"),
    [
        ("grammar", False, [7, 8], None),
        ("refused", True, [7, 99], True),
        ("not compiled", True, None, True),
        ("reasoning", False, [], False),
        ("reasoning ended", False, [8, 9], True),
    ],
)
def test_a_grammar_takes_the_tokens_that_its_request_has_generated(
    seen: dict[str, Any], case: str, refused: bool, taken: list[int] | None, reasoning_ended: bool | None
) -> None:
    *told, has_ended = seen["restored"][case]
    assert told == [refused, taken]
    assert reasoning_ended is None or has_ended is reasoning_ended  # without reasoning, some releases say nothing


def test_a_prompt_may_have_ended_the_reasoning(seen: dict[str, Any]) -> None:
    assert seen["restored"]["no reasoning"][:2] == [False, [7, 8]]


def test_a_prompt_that_is_longer_than_the_context_is_told(seen: dict[str, Any]) -> None:
    assert "a prompt of 30 tokens, and max_model_len is 20 here; give all replicas" in seen["restored"]["prompt"]


def test_a_streaming_input_is_not_movable(seen: dict[str, Any]) -> None:
    assert seen["resumable_is_movable"] is False


def test_aborts_and_utility_calls_arrive(seen: dict[str, Any]) -> None:
    assert seen["abort"] == [True, ["r", "r~1"]]
    assert seen["utility"] == [True, [0, 5, "add_lora", [1, "x"]]]


def test_outputs_of_a_step_are_read_and_restored(seen: dict[str, Any]) -> None:
    assert seen["step"] == ["r", [4, 5], 2.5, True]
    assert seen["restored_prefill_stats"] is None


def test_a_given_up_stream_ends_with_an_error(seen: dict[str, Any]) -> None:
    assert seen["failure"] == ["r", "ERROR"]


def test_requests_that_would_kill_an_engine_are_refused_as_bad_requests(seen: dict[str, Any]) -> None:
    refused = seen["refused"]
    assert "ok" not in refused
    assert "ask for at most 128 at once" in refused["n"]
    assert "top_k=2147483648 is outside the 32-bit range" in refused["top_k"]
    assert "outside the 64-bit range" in refused["seed"]
    assert "kervan_generated, which is kervan's own word; leave it out" in refused["generated"]
    limit = seen["runner_limits"].get("logit_bias")
    assert ("logit_bias" in refused) is (limit is not None)
    if limit is not None:
        assert f"takes at most {limit}" in refused["logit_bias"]


def test_runner_limits_are_found_where_the_runner_has_them(seen: dict[str, Any]) -> None:
    assert seen["runner_limits"] == {
        "logit_bias": 1024, "allowed_token_ids": 1024, "stop_token_ids": 128, "bad_words": 128, "bad_words_tokens": 1024,
    }  # fmt: skip


def test_model_runner_v2s_limits_are_not_v1s(seen: dict[str, Any]) -> None:
    assert seen["broken on V1"] == []
    assert seen["broken on V2"] == ["stop_token_ids", "allowed_token_ids", "logit_bias"]


def test_limits_count_what_the_tokenizer_and_the_model_add(seen: dict[str, Any]) -> None:
    """vLLM adds the model's end tokens to the stop tokens, and makes tokens of words, after its own checks."""
    late = seen["late"]
    assert sorted(late) == ["bad words", "end tokens"]
    assert (
        "stop_token_ids has 130 entries, with the model's end tokens; this engine takes at most 128"
        in late["end tokens"]
    )
    assert "bad_words has 1200 tokens; this engine takes at most 1024" in late["bad words"]


def test_vllm_reads_the_arguments_that_kervan_writes(seen: dict[str, Any]) -> None:
    _, tp, max_model_len, enforce_eager, max_num_seqs = seen["parsed"]
    assert (tp, max_model_len, enforce_eager, max_num_seqs) == (1, 4000, True, 8)


def test_vllms_parser_is_read_from_its_source_as_it_is(seen: dict[str, Any]) -> None:
    assert seen["arguments"]["differences"] == []
    assert seen["arguments"]["not options"] == []


def test_what_goes_into_an_argument_comes_out_of_vllms_parser(seen: dict[str, Any]) -> None:
    assert seen["arguments"]["read wrong"] == []


def test_a_word_that_belongs_to_no_option_is_refused(seen: dict[str, Any]) -> None:
    assert seen["stray_word"] == "vLLM's arguments have 'b.C', which no option takes; leave it out"


def test_lists_and_switches_of_vllm_are_known(tree: Path) -> None:
    source = Source(tree / "vllm")
    arguments = [source.argument(name) for name in source.names]
    assert {a.name for a in arguments if a.action == "append"} == vllm_names.REPEATED_ARGUMENTS
    assert {a.name for a in arguments if a.action == "switch"} == vllm_names.SWITCH_ARGUMENTS
    for name in vllm_names.JSON_LIST_ARGUMENTS:
        assert (source.argument(name).kind, source.argument(name).nargs) == ("json", None)
    for name, (file, variable) in REGISTRIES.items():
        assert len(source.registered(name)) > 10, f"{file} has no {variable}"


def test_a_value_that_vllm_refuses_is_a_config_error(seen: dict[str, Any]) -> None:
    assert "vLLM refuses its arguments: argument --max-num-seqs" in seen["parse_error"]
