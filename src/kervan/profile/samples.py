"""Which part of the work each sampled Python stack belongs to. Pure.

A stack counts for the innermost of its frames that a rule knows: `json.dumps` under vLLM's serving code is JSON, not
serving. Rules look at a frame's file and function as py-spy writes them, `process_outputs (vllm/v1/engine/x.py:12)`.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

_FRAME = re.compile(r"^(?P<function>.+) \((?P<file>[^()]*?)(?::\d+)?\)$")

EVENT_LOOP = "event loop"
GPU_WAIT = "waiting for the GPU"
# (what it is, files, functions); an empty pattern matches all. The first rule that matches a frame wins.
_RULES: tuple[tuple[str, str, str], ...] = (
    ("garbage collection", r"(^|/)gc\.py$", ""),
    ("tokenisation", r"transformers/tokenization|vllm/renderers/|vllm/tokenizers/(?!detok)|chat_utils|jinja2/", ""),
    ("detokenisation", r"vllm/v1/engine/(detokenizer|logprobs)\.py|detokenizer_utils", ""),
    ("output processing", r"vllm/v1/engine/(output_processor|parallel_sampling)\.py", ""),
    ("engine client", r"vllm/v1/engine/async_llm\.py|vllm/v1/metrics/", ""),
    (
        "routing and journal",
        r"kervan/policy/|kervan/fleet/(placement|prefixes|admitted|client|stream|demand|losses)",
        "",
    ),
    (
        "ZMQ and codec",
        r"kervan/fleet/(link|links|listener|wire|codec|sessions|traffic)\.py|kervan/fleet/vllm/codec",
        "",
    ),
    ("ZMQ and codec", r"(^|/)zmq/|vllm/v1/serial_utils|msgspec", ""),
    ("reconnecting clients", r"kervan/fleet/reconnect/|kervan/gateway/reconnect", ""),
    ("JSON", r"pydantic|(^|/)json/|orjson", ""),
    (
        "writing to clients",
        r"uvicorn/|httptools|starlette/responses|fastapi/.*(sse|stream)|kervan/gateway/connection",
        "",
    ),
    ("gateway shell", r"kervan/gateway/", ""),
    ("OpenAI server", r"vllm/entrypoints/|fastapi/|starlette/|anyio/|prometheus", ""),
    ("scheduler", r"vllm/v1/core/", ""),
    (GPU_WAIT, r"torch/cuda/", r"synchronize$"),
    ("sampling", r"vllm/v1/sample/|/sampler\.py$|vllm/v1/worker/gpu/sample/", ""),
    ("sampling", r"vllm/v1/worker/", r"^(_?sample|sample_tokens|_bookkeeping_sync)\b|\._?sample"),
    ("structured output", r"vllm/v1/structured_output|xgrammar|outlines", ""),
    ("model", r"vllm/model_executor/|vllm/v1/attention|torch/|vllm/compilation|vllm/_custom_ops", ""),
    ("prepare and launch", r"vllm/v1/worker/", ""),
    ("engine loop", r"vllm/v1/engine/core\.py|vllm/v1/executor/|kervan/fleet/vllm/|kervan/fleet/", ""),
    ("simulated engine", r"kervan/(twin|sim)/", ""),
    ("threads and queues", r"(^|/)(threading|queue|selectors|concurrent/futures/.*)\.py$", ""),
    (EVENT_LOOP, r"asyncio/|uvloop", ""),
)
_COMPILED = [(name, re.compile(files), re.compile(functions)) for name, files, functions in _RULES]
OTHER = "other"
# Innermost frames that only wait, although py-spy may take them for work: it cannot tell on every kernel.
_WAITS = re.compile(
    r"^_worker \(concurrent/futures/thread\.py|^SocketIO\.readinto \(socket\.py|\((threading|selectors)\.py"
    r"|^Queue\.get \(queue\.py|^(select|poll|epoll) \(|^sched_yield \(vllm/"
)


@dataclass(frozen=True, slots=True)
class StackSamples:
    """`num_samples` of all threads that worked. `parts`: what they belong to; `functions`: the innermost frames.

    Largest first. `num_waiting`: samples of threads that waited for something, which are in neither.
    """

    num_samples: int
    num_waiting: int
    parts: tuple[tuple[str, int], ...]
    functions: tuple[tuple[str, int], ...]

    def share(self, part: str) -> float:
        """Of the samples, 0 to 1."""
        return dict(self.parts).get(part, 0) / self.num_samples if self.num_samples else 0.0


def fold(raw: str) -> StackSamples:
    """py-spy's raw stacks by what they belong to."""
    parts: Counter[str] = Counter()
    functions: Counter[str] = Counter()
    num_waiting = 0
    for line in raw.splitlines():
        stack, _, count = line.rpartition(" ")
        if not stack or not count.isdecimal():
            continue
        frames = [frame for frame in stack.split(";") if not frame.startswith(("thread (", "process "))]
        if frames and _WAITS.search(frames[-1]):
            num_waiting += int(count)
        elif frames:
            parts[part_of(frames)] += int(count)
            functions[frames[-1]] += int(count)
    return StackSamples(parts.total(), num_waiting, _largest(parts), _largest(functions))


def part_of(frames: Sequence[str]) -> str:
    """Of a stack, outermost frame first."""
    for frame in reversed(frames):
        found = _FRAME.match(frame)
        function, file = (found["function"], found["file"]) if found else (frame, "")
        for name, files, functions in _COMPILED:
            if files.search(file) and functions.search(function):
                return name
    return OTHER


def _largest(counted: "Counter[str]") -> tuple[tuple[str, int], ...]:
    return tuple(sorted(counted.items(), key=lambda item: (-item[1], item[0])))
