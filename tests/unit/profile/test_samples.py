"""Stacks of py-spy: to which part of the work each belongs."""

import pytest

from kervan.profile import py_spy, samples

RUN = "run (uvloop/__init__.py:1);"


@pytest.mark.parametrize(
    ("stack", "part"),
    [
        ("process_outputs (vllm/v1/engine/output_processor.py:500);update (vllm/v1/engine/detokenizer.py:90)", "detokenisation"),
        ("process_outputs (vllm/v1/engine/output_processor.py:500)", "output processing"),
        ("completion_stream_generator (vllm/entrypoints/openai/x.py:1);model_dump_json (pydantic/main.py:538)", "JSON"),
        ("completion_stream_generator (vllm/entrypoints/openai/x.py:1);helper (somewhere.py:3)", "OpenAI server"),
        ("send (uvicorn/protocols/http/httptools_impl.py:463)", "writing to clients"),
        ("_deliver (kervan/fleet/client.py:363)", "routing and journal"),
        ("_choose (kervan/fleet/placement.py:106);place (kervan/policy/routing.py:3)", "routing and journal"),
        ("decode (kervan/fleet/vllm/codec.py:93);decode (vllm/v1/serial_utils.py:300)", "ZMQ and codec"),
        ("encode_batch (transformers/tokenization_utils_fast.py:1)", "tokenisation"),
        ("schedule (vllm/v1/core/sched/scheduler.py:20)", "scheduler"),
        ("forward (vllm/v1/sample/sampler.py:20)", "sampling"),
        ("get_output (vllm/v1/worker/gpu/async_utils.py:9);Event.synchronize (torch/cuda/streams.py:245)", "waiting for the GPU"),
        ("_sample (vllm/v1/worker/gpu_model_runner.py:3437)", "sampling"),
        ("_prepare_inputs (vllm/v1/worker/gpu_model_runner.py:1920)", "prepare and launch"),
        ("forward (vllm/model_executor/models/qwen3.py:20);__call__ (torch/_ops.py:1267)", "model"),
        ("Runner.run (asyncio/runners.py:86)", "event loop"),
        ("f (somewhere.py:3)", "other"),
        ("no file at all", "other"),
    ],
)  # fmt: skip
def test_a_stack_counts_for_its_innermost_known_frame(stack: str, part: str) -> None:
    assert samples.part_of((RUN + stack).split(";")) == (part if part != "other" else "event loop")
    assert samples.part_of(stack.split(";")) == part


def test_stacks_fold_to_parts_and_functions_and_waiting_is_apart() -> None:
    raw = """
thread (0x1): "MainThread";send (uvicorn/x.py:1) 7
thread (0x1): "MainThread";model_dump_json (pydantic/main.py:538) 3
thread (0x2): "pool";_worker (concurrent/futures/thread.py:69) 50
process 12:"x";thread (0x3): "c";SocketIO.readinto (socket.py:692) 5
a line that is none
"""
    found = samples.fold(raw)
    assert (found.num_samples, found.num_waiting) == (10, 55)
    assert found.parts == (("writing to clients", 7), ("JSON", 3))
    assert found.functions[0] == ("send (uvicorn/x.py:1)", 7)
    assert found.share("JSON") == 0.3 and samples.fold("").share("JSON") == 0


@pytest.mark.parametrize(
    "said", ["Error: Permission Denied: Try running again", "Error: Operation not permitted (os error 1)"]
)
def test_without_permission_the_reason_names_what_helps(said: str) -> None:
    assert "kernel.yama.ptrace_scope=0" in py_spy.why_not(
        7, f"\n{said}\n"
    ) and "--cap-add SYS_PTRACE" in py_spy.why_not(7, said)


def test_another_failure_is_told_in_py_spys_words() -> None:
    assert py_spy.why_not(7, "Error: Failed to find python version\n\n") == (
        "py-spy could not read process 7: Error: Failed to find python version"
    )
