"""Names and defaults of vLLM that several packages of kervan need (`kervan.vendor.vllm_names`), in each release's source."""

import ast
import re
from pathlib import Path

import pytest
from harness.vllm_sources import TREES, definition, parsed, release, routes

from kervan.config.engine_arguments import OWNED
from kervan.vendor import vllm_names

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
