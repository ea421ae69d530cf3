"""A vLLM engine core in a process of its own, which answers requests whole, and again from every token on.

The tests of exact resume start it once: importing vLLM and making an engine takes half a minute. A request goes through
vLLM's own input processing, kervan's journal and codec, and the steps of `kervan.fleet.vllm.replica`.
`benchmarks/gpu_moves.py` runs it on GPUs, without pytest.
"""

import importlib
import importlib.util
import multiprocessing
import os
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from harness import triton_on_cpu

START_S = 400.0
ANSWER_S = 240.0
V2_THINKING_BUDGET = "vllm.v1.worker.gpu.sample.thinking_budget"  # not in 0.24
MAX_ERROR = 1e-4  # of a log probability, in float32
MAX_STEPS = 50_000  # with batches in flight, a step need not give outputs


@dataclass(frozen=True)
class Ask:
    """A request. `lora`: the adapter's directory; `embeds`: tokens of a prompt of embeddings in place of `prompt`.

    `is_fresh`: nothing of it or of its moves comes from the prefix cache.
    """

    prompt: Sequence[int]
    sampling: Mapping[str, Any]
    structured: Mapping[str, Any] | None = None
    lora: str | None = None
    embeds: int = 0
    is_fresh: bool = False


@dataclass
class Answer:
    """What came. `logprobs`: of each token, pairs of id and value, the token's own first."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    finish: str | None = None
    stop: int | str | None = None
    num_outputs: int = 0


def check(whole: Answer, moved: Sequence[Answer], *, every: int = 1, min_tokens: int = 8) -> None:
    """Every answer of streams moved after 0, `every`, 2 `every`, ... tokens is the one without a move."""
    assert len(whole.tokens) >= min_tokens
    assert len(moved) == len(range(0, len(whole.tokens), every))
    for number, answer in enumerate(moved):
        assert answer.tokens == whole.tokens, f"moved after {number * every} tokens"
        assert (answer.finish, answer.stop) == (whole.finish, whole.stop), f"moved after {number * every} tokens"
        assert len(answer.logprobs) == len(whole.logprobs)
        for ours, theirs in zip(answer.logprobs, whole.logprobs, strict=True):
            assert [id_ for id_, _ in ours] == [id_ for id_, _ in theirs]
            assert all(abs(a - b) < MAX_ERROR for (_, a), (_, b) in zip(ours, theirs, strict=True))


class Oracle:
    """The process; `call` runs a method of `Core` in it.

    `is_async`: steps overlap, as vLLM has them on GPUs and not on CPUs. `is_interpreted`: model runner V2 on a CPU (see
    `triton_on_cpu`). `env`: of the engine. `log`: a file for what it prints.
    """

    def __init__(
        self,
        model: str,
        *,
        tp: int = 1,
        pp: int = 1,
        is_async: bool = False,
        is_interpreted: bool = False,
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
        **engine_args: Any,
    ):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        layout: dict[str, Any] = {"tp": tp, "pp": pp}
        env = dict(env or {})
        if is_interpreted:
            env = triton_on_cpu.ENV | (triton_on_cpu.WORKERS_ENV if tp * pp > 1 else {}) | env
        # A daemon may not have children, which an engine of several workers has.
        self._process = context.Process(
            target=_serve,
            args=(theirs, model, layout, is_async, env, log, engine_args),
            daemon=tp * pp == 1,
        )
        self._process.start()
        theirs.close()
        try:
            self._receive(START_S)
        except BaseException:
            self.close()
            raise

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        self._connection.send((method, args, kwargs))
        return self._receive(ANSWER_S)

    def _receive(self, timeout_s: float) -> Any:
        if not self._connection.poll(timeout_s):
            raise TimeoutError(f"the engine's process did not answer within {timeout_s:.0f} s")
        error, value = self._connection.recv()
        assert error is None, error
        return value

    def close(self) -> None:
        self._connection.close()
        self._process.join(10)
        self._process.kill()
        self._process.join()


def _serve(
    connection: Connection,
    model: str,
    layout: dict[str, Any],
    is_async: bool,
    env: dict[str, str],
    log: Path | None,
    engine_args: dict[str, Any],
) -> None:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ |= env
    if "TRITON_INTERPRET" in env:
        triton_on_cpu.interpret()
    if log is not None:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    core: Any = None
    call: Any = ("", (), {})
    while True:
        try:
            if core is None:
                core, value = Core(model, layout, engine_args, is_async=is_async), None
            else:
                method, args, kwargs = call
                value = getattr(core, method)(*args, **kwargs)
            connection.send((None, value))
        except Exception:  # noqa: BLE001 - told to the test
            connection.send((traceback.format_exc(), None))
        try:
            call = connection.recv()
        except EOFError:
            os._exit(0)


class Core:
    """Runs in the oracle's process."""

    def __init__(self, model: str, layout: dict[str, Any], engine_args: dict[str, Any], *, is_async: bool):
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine import EngineCoreRequest
        from vllm.v1.engine.core import EngineCore
        from vllm.v1.engine.input_processor import InputProcessor
        from vllm.v1.executor import Executor
        from vllm.v1.serial_utils import MsgpackDecoder

        from kervan.config.fleet import FleetConfig
        from kervan.fleet.vllm import runner_v1, versions
        from kervan.fleet.vllm.codec import VllmCodec

        argv = FleetConfig(model=model, **layout, engine_args=engine_args).engine_argv
        self.config = AsyncEngineArgs.from_cli_args(versions.parse_args(argv)).create_engine_config()
        if is_async:  # vLLM's way on GPUs; on CPUs it turns that off, though all its parts are there
            self.config.scheduler_config.async_scheduling = True
        self.core = EngineCore(self.config, Executor.get_class(self.config), log_stats=True)
        self._is_v1 = all(self.core.model_executor.collective_rpc(runner_v1.install))
        self.inputs = InputProcessor(self.config)
        self.codec = VllmCodec()
        self.decoder = MsgpackDecoder(EngineCoreRequest)
        self._num_requests = self._num_accepted_guesses = self._num_preemptions = 0
        self._ended: Any = None

    def runner_is_v1(self) -> bool:
        return bool(self._is_v1)

    def grammar_libraries(self) -> list[str]:
        """Those installed here, under vLLM's names."""
        modules = {"xgrammar": "xgrammar", "guidance": "llguidance", "outlines": "outlines_core"}
        return [name for name, module in modules.items() if importlib.util.find_spec(module) is not None]

    def facts(self) -> dict[str, Any]:
        """What this engine is."""
        config = self.config
        return {
            "runner": "V1" if self._is_v1 else "V2",
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "async_scheduling": config.scheduler_config.async_scheduling,
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "block_size": config.cache_config.block_size,
            "eager": config.model_config.enforce_eager,
            "thinking_budget": self._is_v1 or importlib.util.find_spec(V2_THINKING_BUDGET) is not None,
        }

    def num_accepted_guesses(self) -> int:
        return self._num_accepted_guesses

    def num_preemptions(self) -> int:
        return self._num_preemptions

    def token_id(self, text: str) -> int:
        (id_,) = self.inputs.renderer.get_tokenizer().encode(text, add_special_tokens=False)
        return int(id_)

    def text(self, tokens: Sequence[int]) -> str:
        return str(self.inputs.renderer.get_tokenizer().decode(tokens, skip_special_tokens=True))

    def use_grammar_library(self, name: str) -> None:
        """An engine keeps the library of its first grammar; this one forgets it."""
        if name == "guidance":
            self._widen_vocabulary()
        manager = self.core.structured_output_manager
        manager.backend = manager.backend_name = manager._grammar_bitmask = None  # the name since 0.33
        self.config.structured_outputs_config.backend = name

    @staticmethod
    def _widen_vocabulary() -> None:
        hf: Any = importlib.import_module("llguidance.hf")
        if not hasattr(hf, "original"):  # it wants one id more than the tokenizer has; real vocabularies are padded
            hf.original = hf.from_tokenizer
            hf.from_tokenizer = lambda tokenizer, size=None, **more: hf.original(tokenizer, size + 1, **more)

    def use_reasoning_parser(self, name: str | None) -> None:
        from vllm.reasoning import ReasoningParserManager

        parser = ReasoningParserManager.get_reasoning_parser(name) if name else None
        self.core.structured_output_manager.reasoner_cls = parser

    # ---- requests

    def request(self, ask: Ask) -> Any:
        import msgspec
        import torch
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RepetitionDetectionParams, SamplingParams, StructuredOutputsParams

        self._num_requests += 1
        structured = StructuredOutputsParams(**ask.structured) if ask.structured else None
        sampling = dict(ask.sampling)
        if "repetition_detection" in sampling:
            sampling["repetition_detection"] = RepetitionDetectionParams(**sampling["repetition_detection"])
        prompt: Any = {"prompt_token_ids": list(ask.prompt)}
        if ask.embeds:
            noise = torch.Generator().manual_seed(0)
            width = self.config.model_config.get_hidden_size()
            prompt = {"prompt_embeds": torch.randn(ask.embeds, width, generator=noise)}
        request = self.inputs.process_inputs(
            f"r{self._num_requests}",
            prompt,
            SamplingParams(**sampling, structured_outputs=structured),
            ("generate",),
            lora_request=LoRARequest("adapter", 1, ask.lora) if ask.lora else None,
        )
        return msgspec.structs.replace(request, cache_salt=request.request_id) if ask.is_fresh else request

    def place(self, request: Any, generated: Sequence[int], epoch: int = 1, *, is_fresh: bool = False) -> str:
        """As a gateway and a replica do it; the id under which outputs come."""
        import msgspec

        if is_fresh:
            request = msgspec.structs.replace(request, cache_salt=f"{request.request_id}~{epoch}")
        stream = self.codec.describe(request)
        stream.generated, stream.epoch = list(generated), epoch
        stream.wire_id = f"{stream.request_id}~{epoch}" if epoch else stream.request_id
        _, *frames = self.codec.encode_add(stream)
        self.arrive(self.decoder.decode([bytes(frame) for frame in frames]))
        return stream.wire_id

    def arrive(self, request: Any) -> None:
        from kervan.fleet.vllm import resume

        prepared, wave = self.core.preprocess_add_request(request)
        resume.restore(prepared, self.core.structured_output_manager, self.config.model_config.max_model_len)
        if prepared.is_finished():
            self._ended = resume.ending(prepared)
        else:
            self.core.add_request(prepared, wave)

    # ---- answers

    def run(self, ids: Sequence[str], *, preempt_after: int | None = None) -> dict[str, Answer]:
        """Step until all are answered."""
        answers = {id_: Answer() for id_ in ids}
        num_steps = 0
        ended, self._ended = self._ended, None
        self._take(answers, ended)
        while any(answer.finish is None for answer in answers.values()):
            outputs = self._step()
            num_steps += 1
            assert num_steps < MAX_STEPS, {id_: len(a.tokens) for id_, a in answers.items() if a.finish is None}
            self._take(answers, outputs)
            stats = outputs.scheduler_stats if outputs is not None else None
            if stats is not None and stats.spec_decoding_stats is not None:
                self._num_accepted_guesses += stats.spec_decoding_stats.num_accepted_tokens
            if num_steps == preempt_after:
                self.core.scheduler.reset_prefix_cache(reset_running_requests=True)
        return answers

    def _step(self) -> Any:
        """As vLLM's engine loop does it; the outputs, or None when none have come yet (with batches in flight)."""
        outputs, has_executed = self.core.step_fn()
        self.core.post_step(has_executed)
        if not has_executed:
            time.sleep(0.001)  # a grammar is being compiled, perhaps
        return outputs.get(0) if outputs else None

    def _take(self, answers: dict[str, Answer], outputs: Any) -> None:
        for output in outputs.outputs if outputs is not None else ():
            self._num_preemptions += sum(event.type.name == "PREEMPTED" for event in output.events or ())
            answer = answers.get(output.request_id)
            if answer is None:
                continue
            answer.num_outputs += 1
            answer.tokens += output.new_token_ids
            if output.new_logprobs is not None:
                ids, values, _, *_ = output.new_logprobs
                for row, numbers in zip(ids, values, strict=True):
                    answer.logprobs.append([(int(i), float(v)) for i, v in zip(row, numbers, strict=True)])
            if output.finish_reason is not None:
                answer.finish, answer.stop = str(output.finish_reason), output.stop_reason

    def whole(self, ask: Ask) -> Answer:
        request = self.request(ask)
        return self.run([self.place(request, (), 0)])[request.request_id]

    def answers(
        self, asks: Sequence[Ask], generated: Sequence[Sequence[int]] = (), *, preempt_after: int | None = None
    ) -> list[Answer]:
        """All at once; `generated`: what each has on arrival, which its answer begins with, too."""
        placed = []
        for number, ask in enumerate(asks):
            tokens = generated[number] if generated else ()
            placed.append(self.place(self.request(ask), tokens, 1 if generated else 0))
        found = self.run(placed, preempt_after=preempt_after)
        if generated:
            for id_, tokens in zip(placed, generated, strict=True):
                found[id_].tokens = [*tokens, *found[id_].tokens]
        return [found[id_] for id_ in placed]

    def from_every_token(
        self, ask: Ask, *, every: int = 1, at_once: int = 64, preempt_after: int | None = None
    ) -> tuple[Answer, list[Answer]]:
        """The answer without a move, and those of streams moved after 0, 1, 2, ... tokens, with the tokens before.

        `every`: only after each so many tokens.
        """
        request = self.request(ask)
        whole = self.run([self.place(request, (), 0)])[request.request_id]
        cuts = range(0, len(whole.tokens), every)
        moved: list[Answer] = []
        for first in range(0, len(cuts), at_once):
            ids = [
                self.place(request, whole.tokens[:cut], 1 + cut, is_fresh=ask.is_fresh)
                for cut in cuts[first : first + at_once]
            ]
            answers = self.run(ids, preempt_after=preempt_after)
            moved += [answers[id_] for id_ in ids]
        for cut, answer in zip(cuts, moved, strict=True):
            answer.tokens = [*whole.tokens[:cut], *answer.tokens]
            answer.logprobs = [*whole.logprobs[:cut], *answer.logprobs]
        return whole, moved

    def resumed(self, ask: Ask, generated: Sequence[int]) -> Answer:
        id_ = self.place(self.request(ask), generated)
        return self.run([id_])[id_]

    def moved_after_each_token(self, ask: Ask) -> tuple[Answer, list[int]]:
        """The answer without a move, and the tokens of a stream that moves again and again."""
        request = self.request(ask)
        whole = self.run([self.place(request, (), 0)])[request.request_id]
        tokens: list[int] = []
        for epoch in range(1, len(whole.tokens) + 1):
            id_ = self.place(request, tokens, epoch)
            answers = {id_: Answer()}
            while not answers[id_].tokens:
                self._take(answers, self._step())
            tokens += answers[id_].tokens
            self.core.abort_requests([id_])
        return whole, tokens

    def aborted(self, ask: Ask, generated: Sequence[int]) -> int:
        """How many requests the engine still has after an abort."""
        id_ = self.place(self.request(ask), generated)
        self._step()
        self.core.abort_requests([id_])
        for _ in range(1 + self.core.batch_queue_size):
            self._step()
        return len(self.core.scheduler.requests)

    def carried(self, ask: Ask, generated: Sequence[int]) -> dict[str, Any]:
        """What arrives in a replica of a moved request."""
        from kervan.fleet.vllm import resume

        stream = self.codec.describe(self.request(ask))
        stream.generated, stream.epoch, stream.wire_id = list(generated), 1, "r~1"
        _, *frames = self.codec.encode_add(stream)
        params = self.decoder.decode([bytes(frame) for frame in frames]).sampling_params
        return {"prompt_logprobs": params.prompt_logprobs, "generated": resume.carried(params)}

    def arrives_with_prompt(self, prompt: list[int]) -> None:
        import msgspec

        request = self.request(Ask(prompt[:10], {"max_tokens": 2}))
        self.arrive(msgspec.structs.replace(request, prompt_token_ids=prompt))
