"""kervan's adapter (`kervan.fleet.vllm`), imported over each release of vLLM in a process of its own."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness.vllm_sources import release

import kervan
from kervan.fleet.vllm.argument_source import REGISTRIES, Source
from kervan.vendor import vllm_names

IMPORT_TIMEOUT_S = 500.0  # importing vLLM takes 20 to 35 s, and minutes on a machine that does other work too

pytestmark = pytest.mark.timeout(IMPORT_TIMEOUT_S + 60)


# ---- the adapter itself, imported over each tree


def profiled(directory: str) -> dict[str, Any]:
    """What a profile of a worker has, and what is left of it; sent with `probe`."""
    import contextlib
    from pathlib import Path
    from types import SimpleNamespace

    import torch

    from kervan.fleet.vllm import profiling
    from kervan.profile import trace as traces

    class Runner:
        def _sample(self) -> Any:
            return torch.ones(8, 8) @ torch.ones(8, 8)

    worker = SimpleNamespace(rank=0, profiler=None, model_runner=Runner())
    other = SimpleNamespace(rank=1, profiler=None, model_runner=Runner())
    wrapper = SimpleNamespace(worker=worker)
    place = Path(directory) / "profile"
    place.mkdir(exist_ok=True)
    problems = [
        profiling.begin_in_worker(wrapper, str(place), True),
        profiling.begin_in_worker(other, str(place), True),
    ]
    problems.append(profiling.begin_in_worker(wrapper, str(place), True))
    worker.profiler.step()
    with worker.profiler.annotate_context_manager("execute_context_0(0)_generation_2(2)") or contextlib.nullcontext():
        worker.model_runner._sample()
    problems += [profiling.end_in_worker(wrapper), profiling.end_in_worker(wrapper), profiling.end_in_worker(other)]
    found = traces.read((place / "torch.json").read_bytes())
    return {
        "problems": problems,
        "ranges": sorted({event.name for event in found.of(traces.RANGE)}),
        "has_products": any("mm" in event.name for event in found.of(traces.OPERATION)),
        "left": [worker.profiler, "_sample" in vars(worker.model_runner), worker.kervan_profile],
    }


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

    import msgspec
    import torch
    from vllm.exceptions import VLLMValidationError
    from vllm.lora.request import LoRARequest
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
    from vllm.pooling_params import PoolingParams
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, EngineCoreRequestType
    from vllm.v1.metrics.stats import PrefillStats
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

    def prompt(sampling: Any = None, **changes: Any) -> Any:
        wanted = msgspec.structs.replace(request(sampling or SamplingParams(**base)), **changes)
        content = codec.prompt(codec.describe(wanted))
        return content and [list(content.token_ids), content.scope, content.items]

    lora = LoRARequest(lora_name="poet", lora_int_id=1, lora_path="/poet")
    cat = MultiModalFeatureSpec(None, "image", "cat", PlaceholderRange(offset=1, length=2))
    seen["prompts"] = [prompt(), prompt(lora_request=lora, cache_salt=None), prompt(mm_features=[cat])]
    seen["no prompts"] = [
        prompt(prompt_token_ids=None, prompt_embeds=torch.zeros(3, 8)),
        prompt(resumable=True),
        prompt(SamplingParams(prompt_logprobs=1)),
    ]
    stats = PrefillStats()
    stats.set(num_prompt_tokens=100, num_local_cached_tokens=32, num_external_cached_tokens=16)
    begun = EngineCoreOutput(request_id="r", new_token_ids=[4], prefill_stats=stats)
    seen["cached"] = [codec.cached_tokens(begun), codec.cached_tokens(EngineCoreOutput("r", [4]))]

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

    seen["profiled"] = profiled(model)
    frontend.settle_environment()
    frontend.settle_environment()
    seen["arguments"] = argument_readings()
    seen["struct_is_positional"] = EngineCoreRequest.__struct_config__.array_like
    seen["engine_client"] = engine_client.FleetEngineClient.__name__
    seen["frontend"] = frontend.OpenAIFrontend.__name__
    ended = frontend.OpenAIFrontend(SimpleNamespace(), None, SimpleNamespace(served_model_name=None, model="m"))
    seen["names_when_ended"] = ended.model_names
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
    script.write_text(
        head + "".join(map(inspect.getsource, (profiled, restored_requests, argument_readings, probe))) + tail
    )
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


def test_a_worker_that_runs_is_profiled_and_left_as_it_was(seen: dict[str, Any]) -> None:
    told = seen["profiled"]
    taken = "a profile that was begun with /start_profile is there already; end it with /stop_profile"
    assert told["problems"] == ["", "", taken, "", "", ""]
    assert told["ranges"] == ["execute_context_0(0)_generation_2(2)", "sampling"] and told["has_products"]
    assert told["left"] == [None, False, None]


def test_the_adapter_loads_over_this_release(seen: dict[str, Any], tree: Path) -> None:
    assert seen["engine_version"] == release(tree)
    assert seen["core_bases"][:3] == ["FleetEngineCore", "EngineCoreProc", "EngineCore"]
    assert (seen["engine_client"], seen["frontend"]) == ("FleetEngineClient", "OpenAIFrontend")


def test_a_gateway_whose_app_has_ended_still_tells_its_model(seen: dict[str, Any]) -> None:
    assert seen["names_when_ended"] == ["m"], "its last heartbeat has what was counted meanwhile"


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


def test_what_the_prefix_cache_tells_prompts_apart_by_is_read(seen: dict[str, Any]) -> None:
    assert seen["prompts"] == [
        [[1, 2, 3], ["", "", "salt"], []],
        [[1, 2, 3], ["poet", "/poet", ""], []],
        [[1, 2, 3], ["", "", "salt"], [[1, "cat"]]],
    ]
    assert seen["no prompts"] == [None, None, None]
    assert seen["cached"] == [32, None]


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
