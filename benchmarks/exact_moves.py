"""Streams moved after each of their tokens, on several engines side by side: is the answer the one without a move?

The requests and the engine's process are those of `tests/contract/test_resume.py`; here they run on whatever device
there is. Beside the moved streams, as a control, the same request is asked again without a move in a batch of as many:
in bf16 that changes tokens too.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))  # not first: a tests/ may hold any name

from harness.resume_asks import FEW, GRAMMARS, GREEDY, LONG_PROMPT, PENALTIES, PROMPT, SAMPLINGS, SEEDED, TAG, TALKING
from harness.resume_oracle import Answer, Ask, Oracle

from kervan.demo import make_lora_adapter, make_random_model

Row = dict[str, Any]
Keep = Callable[[Row], None]
MAX_CONTROLS = 32
SMALL = {"max_model_len": 256, "block_size": 32, "max_num_seqs": 48}
REASONING = {
    "reasoning_parser": "deepseek_r1",
    "reasoning_config": {"reasoning_start_str": "<think>", "reasoning_end_str": "</think>"},
}
# Triton multiplies float32 matrices in TF32 unless told not to; float32 is here to leave no doubt.
IEEE = {"TRITON_F32_DEFAULT": "ieee"}
V1 = {"VLLM_USE_V2_MODEL_RUNNER": "0"}


@dataclass(frozen=True)
class Engine:
    """An engine to try. `is_chunked`: 64 tokens a step, so prompts and moved streams come in several chunks.

    `is_interpreted`: V2 on a CPU, as `triton_on_cpu` has it; steps overlap. `every`: moved after each so many tokens.
    """

    name: str
    dtype: str
    args: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    tp: int = 1
    pp: int = 1
    is_chunked: bool = False
    has_lora: bool = False
    has_extras: bool = False  # what model runner V2 of vLLM 0.24 does not take
    guesses: bool = False
    is_interpreted: bool = False
    every: int = 1

    @property
    def is_exact(self) -> bool:
        return self.dtype == "float32"


GUESSING = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}}
EXTRAS = {"enable_prompt_embeds": True, "logits_processors": "harness.counting_processor:CountingProcessor"}
EAGER = {"enforce_eager": True}
ENGINES = (
    Engine("V2 float32", "float32", REASONING, IEEE, is_chunked=True),
    Engine("V2 bf16", "bfloat16", REASONING, has_lora=True),
    Engine("V2 bf16, batch invariant", "bfloat16", REASONING, {"VLLM_BATCH_INVARIANT": "1"}),
    Engine("V1 float32", "float32", {**REASONING, **EXTRAS, **EAGER}, {**IEEE, **V1}, is_chunked=True, has_extras=True),
    Engine("V1 bf16", "bfloat16", {**REASONING, **EAGER}, V1, has_lora=True),
    Engine("V1 float32, n-gram guesses", "float32", {**GUESSING, **EAGER}, {**IEEE, **V1}, guesses=True),
)
PARALLEL_ENGINES = (
    Engine("V2 float32, tp 2", "float32", REASONING, IEEE, tp=2, is_chunked=True),
    Engine("V2 float32, pp 2", "float32", REASONING, IEEE, pp=2, is_chunked=True),
    Engine("V2 bf16, tp 2", "bfloat16", {}, tp=2, has_lora=True),
    Engine("V1 float32, tp 2", "float32", {**REASONING, **EAGER}, {**IEEE, **V1}, tp=2, is_chunked=True),
)
INTERPRETED_ENGINES = (
    Engine(
        "V2 float32, interpreted", "float32", {**REASONING, **EAGER},
        is_chunked=True, has_lora=True, is_interpreted=True, every=3,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Models:
    """Where the random model and its adapter are."""

    model: Path
    lora: Path

    @classmethod
    def make(cls, directory: Path) -> "Models":
        model = make_random_model(directory / "random")
        return cls(model, make_lora_adapter(model, directory / "lora"))


class Trial:
    """One engine that runs; `rows` yields what becomes of each case."""

    def __init__(self, engine: Engine, models: Models, device: Mapping[str, Any], env: Mapping[str, str], log: Path):
        self.engine = engine
        self._lora = str(models.lora)
        args = {**SMALL, **device, "dtype": engine.dtype, **engine.args}
        if engine.is_chunked:
            args["max_num_batched_tokens"] = 64
        if engine.has_lora:
            args |= {"enable_lora": True, "max_lora_rank": 8}
        if not engine.is_exact:
            args["logprobs_mode"] = "processed_logprobs"  # what the greedy choice goes by: tells how near a tie was
        if engine.tp * engine.pp == 1:
            env = {}
        env = {**env, **engine.env, "VLLM_LOGGING_LEVEL": "INFO"}
        kind = {"is_async": True, "is_interpreted": True} if engine.is_interpreted else {}
        self.oracle = Oracle(str(models.model), tp=engine.tp, pp=engine.pp, env=env, log=log, **kind, **args)
        self.facts: dict[str, Any] = self.oracle.call("facts")
        if "reasoning_parser" in engine.args:
            self.oracle.call("use_reasoning_parser", None)

    # ---- one case

    def _fit(self, ask: Ask) -> Ask:
        """A bias in place of `allowed_token_ids` on runner V2: without the barriers of later releases, the kernel of
        vLLM 0.24 for them gives other answers in a batch than alone. (The interpreter runs one program at a time.)"""
        if self.facts["runner"] == "V1" or self.engine.is_interpreted or "allowed_token_ids" not in ask.sampling:
            return ask
        sampling = dict(ask.sampling)
        bias = sampling.get("logit_bias", {})
        sampling["logit_bias"] = {id_: 100.0 + bias.get(id_, 0.0) for id_ in sampling.pop("allowed_token_ids")}
        return replace(ask, sampling=sampling)

    def _moved(self, ask: Ask, **how: Any) -> Row:
        """The request whole, moved after each token, and whole again in a batch."""
        ask = self._fit(ask)
        sampling = dict(ask.sampling)
        is_greedy = sampling.get("temperature") == 0.0
        if not self.engine.is_exact and "logprob_token_ids" not in sampling:
            sampling["logprobs"] = max(2, sampling.get("logprobs", 0))
            ask = Ask(ask.prompt, sampling, ask.structured, ask.lora, ask.embeds, ask.is_fresh)
        whole, moved = self.oracle.call("from_every_token", ask, every=self.engine.every, **how)
        num_controls = 4 if self.engine.is_interpreted else MAX_CONTROLS
        again = self.oracle.call("answers", [ask] * min(len(moved), num_controls), **how)
        return {**compared(whole, moved, with_margins=is_greedy), "control": control(whole, again)}

    def _resumed(self, ask: Ask) -> Row:
        whole, tokens = self.oracle.call("moved_after_each_token", self._fit(ask))
        answer = Answer(tokens=tokens, finish=whole.finish, stop=whole.stop)
        return compared(whole, [answer], with_margins=False)

    def _grammar(self, library: str, ask: Ask) -> Row:
        self.oracle.call("use_grammar_library", library)
        return self._moved(ask)

    def _reasoning(self, library: str) -> Row:
        """A bias lets the reasoning end after some tokens; V2 of vLLM 0.24 takes no thinking budget."""
        self.oracle.call("use_grammar_library", library)
        start, end = self.oracle.call("token_id", "<think>"), self.oracle.call("token_id", "</think>")
        sampling = {"temperature": 0.0, "max_tokens": 48, **PENALTIES}
        prompt = [*PROMPT, start]
        self.oracle.call("use_reasoning_parser", "deepseek_r1")
        try:
            for bias in range(1, 20):
                ask = Ask(prompt, {**sampling, "logit_bias": {end: float(bias)}}, GRAMMARS["json schema"])
                tokens = self.oracle.call("whole", ask).tokens
                if end in tokens[3:20]:
                    return {**self._moved(ask), "reasoning_tokens": tokens.index(end)}
        finally:
            self.oracle.call("use_reasoning_parser", None)
        raise AssertionError("no bias made the reasoning end after 3 to 19 tokens")

    def _thinking_budget(self) -> Row:
        start = self.oracle.call("token_id", "<think>")
        return self._moved(Ask([*PROMPT, start], {**TALKING, "thinking_token_budget": 9}))

    def _ends(self) -> Row:
        eos = self.oracle.call("token_id", "<|im_end|>")
        few = {"allowed_token_ids": (*FEW, eos), "logit_bias": {eos: 100.0}}
        ask = Ask(PROMPT, {**PENALTIES, **few, "temperature": 0.0, "max_tokens": 32, "min_tokens": 14})
        return self._moved(ask)

    def _stop_token(self) -> Row:
        stop = self.oracle.call("whole", self._fit(Ask(PROMPT, TALKING))).tokens[11]
        return self._moved(Ask(PROMPT, {**TALKING, "stop_token_ids": [stop]}))

    def _refused_grammar(self) -> Row:
        """Ends that request with an error; the engine goes on."""
        self.oracle.call("use_grammar_library", "xgrammar")
        ask = Ask(PROMPT, {"temperature": 0.0, "max_tokens": 48}, GRAMMARS["regex"])
        finish = self.oracle.call("resumed", ask, [90, 91, 92]).finish
        return {**self._moved(ask), "finish_of_the_refused": finish}

    def _naive(self) -> Row:
        """With the tokens as prompt, as a naive resume has them: counts how many come out right, to show the rest."""
        whole = self.oracle.call("whole", self._fit(Ask(PROMPT, TALKING)))
        asks = [Ask((*PROMPT, *whole.tokens[:cut]), {**TALKING, "max_tokens": 32 - cut}) for cut in range(1, 32)]
        found = self.oracle.call("answers", [self._fit(ask) for ask in asks])
        answers = [
            Answer([*whole.tokens[:cut], *answer.tokens], finish=answer.finish, stop=answer.stop)
            for cut, answer in enumerate(found, 1)
        ]
        return compared(whole, answers, with_margins=False)

    # ---- all cases

    def cases(self) -> Iterator[tuple[str, Callable[[], Row]]]:
        """Name and what finds its row, in order."""
        if self.engine.guesses:
            yield from self._guessing()
            return
        moved = self._moved
        for name, sampling in SAMPLINGS.items():
            yield name, partial(moved, Ask(PROMPT, sampling, is_fresh=True))
            yield f"{name}, prefix cached", partial(moved, Ask(PROMPT, sampling))
        yield "min_tokens before an end", self._ends
        yield "stop token", self._stop_token
        to_the_end = Ask([20 + i % 300 for i in range(236)], {**TALKING, "max_tokens": 100})
        yield "end of the context", partial(moved, to_the_end)
        detection = {"max_pattern_size": 3, "min_pattern_size": 1, "min_count": 6}
        repeating = {**GREEDY, "allowed_token_ids": [70, 71], "repetition_detection": detection}
        yield "repetition detection", partial(moved, Ask(PROMPT, repeating))
        yield from self._structured()
        yield from self._engines_own()
        yield "move after move, seed", partial(self._resumed, Ask(PROMPT, {**SEEDED, "seed": 5}))
        yield "naive resume (differs)", self._naive

    def _guessing(self) -> Iterator[tuple[str, Callable[[], Row]]]:
        prompt = [*PROMPT, *FEW, *FEW]
        yield "greedy", partial(self._moved, Ask(prompt, {**GREEDY, "allowed_token_ids": FEW[:4]}))
        yield "penalties", partial(self._moved, Ask(prompt, {**TALKING, "frequency_penalty": 0.2}))
        yield "accepted guesses", lambda: {"count": self.oracle.call("num_accepted_guesses")}

    def _structured(self) -> Iterator[tuple[str, Callable[[], Row]]]:
        sampling = {"temperature": 0.0, "max_tokens": 48, **PENALTIES}
        for library in self.oracle.call("grammar_libraries"):
            for kind, grammar in GRAMMARS.items():
                if (library, kind) != ("outlines", "ebnf"):  # it has none
                    yield f"{library}: {kind}", partial(self._grammar, library, Ask(PROMPT, sampling, grammar))
        yield "xgrammar: structural tag", partial(self._grammar, "xgrammar", Ask(PROMPT, sampling, TAG))
        yield "xgrammar: tokens that it refuses", self._refused_grammar
        if "reasoning_parser" in self.engine.args:
            yield "xgrammar: after reasoning", partial(self._reasoning, "xgrammar")
            if self.facts["thinking_budget"]:
                yield "thinking budget", self._thinking_budget

    def _engines_own(self) -> Iterator[tuple[str, Callable[[], Row]]]:
        moved, engine = self._moved, self.engine
        if engine.has_lora:
            yield "LoRA", partial(moved, Ask(PROMPT, TALKING, lora=self._lora, is_fresh=True))
            yield "LoRA, prefix cached", partial(moved, Ask(PROMPT, TALKING, lora=self._lora))
        words = "long, in chunks" if engine.is_chunked else "long"
        for kind, sampling in (("greedy", TALKING), ("seed", SEEDED)):
            yield f"{words}, {kind}", partial(moved, Ask(LONG_PROMPT, {**sampling, "max_tokens": 60}, is_fresh=True))
            again = Ask(PROMPT, sampling, is_fresh=True)
            yield f"preempted after the move, {kind}", partial(moved, again, preempt_after=3)
        if engine.has_extras:
            yield (
                "logits processor of the user's",
                partial(moved, Ask(PROMPT, {**GREEDY, "extra_args": {"counts": True}})),
            )
            yield "prompt of embeddings", partial(moved, Ask((), TALKING, embeds=24))


# ---- comparing


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Where two answers part; None if they do not."""
    for position, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            return position
    return None if len(ours) == len(theirs) else min(len(ours), len(theirs))


def margin(answer: Answer, position: int) -> float | None:
    """By how much the first token led the second there, in log probability."""
    if position >= len(answer.logprobs):
        return None
    values = sorted(dict(answer.logprobs[position]).values(), reverse=True)
    return values[0] - values[1] if len(values) > 1 else None


def compared(whole: Answer, moved: Sequence[Answer], *, with_margins: bool) -> Row:
    """How many of `moved` are `whole`, where they part from it, and by how much log probabilities differ till then."""
    parted, margins, errors = [], [], [0.0]
    for answer in moved:
        position = first_difference(whole.tokens, answer.tokens)
        if position is not None:
            parted.append(position)
            if with_margins and (lead := margin(whole, position)) is not None:
                margins.append(round(lead, 4))
        elif (answer.finish, answer.stop) != (whole.finish, whole.stop):
            parted.append(len(whole.tokens))
        for ours, theirs in zip(answer.logprobs[:position], whole.logprobs[:position], strict=False):
            known = dict(theirs)
            errors += [abs(value - known[id_]) for id_, value in ours if id_ in known and value > -1e4]
    row: Row = {"moved": len(moved), "same": len(moved) - len(parted), "tokens": len(whole.tokens)}
    row["finish"] = whole.finish
    if parted:
        row["parted_at"] = sorted(parted)
    if margins:
        row["margins"] = sorted(margins)
    if whole.logprobs:
        row["largest_logprob_error"] = round(max(errors), 6)
    return row


def control(whole: Answer, again: Sequence[Answer]) -> Row:
    """The same for answers that were not moved."""
    same = sum(answer.tokens == whole.tokens for answer in again)
    return {"asked": len(again), "same": same}


# ---- running


class Trials:
    """All engines at once, each in a thread and a process of its own."""

    def __init__(self, keep: Keep, deadline_s: float, log_dir: Path):
        self._keep, self._deadline_s, self._log_dir = keep, deadline_s, log_dir
        self._trials: list[Trial] = []

    def run(self, engines: Sequence[Engine], models: Models, device: Mapping[str, Any], env: Mapping[str, str]) -> None:
        """Blocks until all are done, or until the deadline (of time.monotonic)."""
        threads = [
            threading.Thread(target=self._try, args=(engine, models, device, env), daemon=True) for engine in engines
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, self._deadline_s - time.monotonic()))
        for trial in self._trials:
            trial.oracle.close()

    def _try(self, engine: Engine, models: Models, device: Mapping[str, Any], env: Mapping[str, str]) -> None:
        begin_s = time.monotonic()
        log = self._log_dir / f"{engine.name.replace(' ', '-').replace(',', '')}.log"
        try:
            trial = Trial(engine, models, device, env, log)
        except Exception as error:  # noqa: BLE001 - a row says it; the others go on
            self._keep({"engine": engine.name, "case": "start", "failed": last_line(error), "took_s": took(begin_s)})
            return
        self._trials.append(trial)
        self._keep({"engine": engine.name, "case": "start", "facts": trial.facts, "took_s": took(begin_s)})
        for case, run in trial.cases():
            if time.monotonic() > self._deadline_s:
                self._keep({"engine": engine.name, "case": case, "failed": "no time left"})
                return
            begin_s = time.monotonic()
            try:
                row = run()
            except (EOFError, OSError) as error:
                self._keep({"engine": engine.name, "case": case, "failed": f"the engine died: {error!r}"})
                return
            except Exception as error:  # noqa: BLE001 - a row says it; the next case may do
                row = {"failed": last_line(error)}
            self._keep({"engine": engine.name, "case": case, **row, "took_s": took(begin_s)})


def took(begin_s: float) -> float:
    return round(time.monotonic() - begin_s, 2)


def last_line(error: BaseException) -> str:
    """The end of what an engine's process has raised."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return (lines[-1] if lines else repr(error))[:400]


def table(rows: Sequence[Row]) -> str:
    """One line per case."""
    lines = [f"{'engine':<27} {'case':<50} {'same':>9} {'control':>9}  parts first at; largest lead there; logprobs"]
    for row in rows:
        head = f"{row['engine']:<27} {row['case']:<50}"
        if "failed" in row:
            lines.append(f"{head} FAILED {row['failed'][:160]}")
        elif "moved" not in row:
            lines.append(f"{head} {row.get('facts', row.get('count'))} {row['took_s']} s")
        else:
            rest = []
            if "parted_at" in row:
                rest.append(f"{row['parted_at'][0]}")
            if "margins" in row:
                rest.append(f"{row['margins'][-1]:.4f}")
            if "largest_logprob_error" in row:
                rest.append(f"{row['largest_logprob_error']:.1e}")
            beside = row.get("control")
            against = f"{beside['same']}/{beside['asked']}" if beside else "-"
            lines.append(f"{head} {row['same']:>4}/{row['moved']:<4} {against:>9}  {'; '.join(rest)}")
    return "\n".join(lines)
