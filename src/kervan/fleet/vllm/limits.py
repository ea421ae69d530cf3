"""Requests that vLLM accepts but that would kill an engine: refused at the gateway instead."""

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sized
from typing import Any

import msgspec
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from kervan.fleet import wire
from kervan.fleet.vllm import grammar_size

INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1
# Each of the n sequences is a request of its own; vLLM's own bound (16,384) lets one request fill a fleet.
MAX_N = 128
# A grammar's compilation has no time limit in the engine (a regex's has) and holds up the other ones there. Measured
# with xgrammar 0.2.8, one core, a vocabulary of 257 (a real one costs more): 30 enum strings of 2,000 characters and
# 900 nested `(...){0,99}` were stopped after 10 s; the slowest of seven at these bounds, 62 enum strings of 502, took
# 1.6 s.
MAX_GRAMMAR_CHARS = 32 * 1024
MAX_PATTERN_CHARS = 8 * 1024
MAX_CHOICE_CHARS = 512
MAX_DEPTH = 50
# What xgrammar takes in some places or not at all, and of it what llguidance takes.
NAMED_KEYWORDS = frozenset(
    {
        "multipleOf", "uniqueItems", "contains", "minContains", "maxContains", "format", "pattern", "minLength",
        "maxLength", "propertyNames", "patternProperties", "minProperties", "maxProperties",
    }
)  # fmt: skip
GUIDANCE_KEYWORDS = frozenset({"multipleOf", "pattern", "minLength", "maxLength"})
# Up to this size it is worth a compilation here, of milliseconds, to learn that a recursive grammar has no sentence.
MAX_PROBED_CHARS = 4 * 1024


def violation(params: SamplingParams, entry_limits: Mapping[str, int]) -> tuple[str, str, Any] | None:
    """(message, parameter, value) of the first limit that `params` breaks, or None.

    `entry_limits`: of the replicas' model runner, by parameter; `versions.runner_limits`.
    """
    if params.n > MAX_N:
        return f"n={params.n} sequences exceed {MAX_N}; ask for at most {MAX_N} at once", "n", params.n
    if (unsendable := _unsendable(params)) is not None:
        name, error = unsendable
        return f"{name} cannot be sent to an engine: {error}", name, None
    if params.extra_args and wire.GENERATED in params.extra_args:
        return f"vllm_xargs names {wire.GENERATED}, which is kervan's own word; leave it out", "extra_args", None
    for name, limit in entry_limits.items():
        value = getattr(params, name, None)
        if name == "stop_token_ids" and not params.min_tokens:  # its runner reads them for min_tokens only
            continue
        if isinstance(value, Sized) and len(value) > limit:
            return f"{name} has {len(value)} entries; this engine takes at most {limit}", name, len(value)
    for name in ("top_k", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs"):
        value = getattr(params, name, None)
        if isinstance(value, int) and not -INT32_MAX <= value <= INT32_MAX:
            return f"{name}={value} is outside the 32-bit range", name, value
    if params.seed is not None and not -INT64_MAX <= params.seed <= INT64_MAX:
        return f"seed={params.seed} is outside the 64-bit range", "seed", params.seed
    for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
        for token_id in getattr(params, name, None) or ():
            if not 0 <= int(token_id) <= INT32_MAX:
                return f"{name} names token id {token_id}; ids are in 0..{INT32_MAX}", name, token_id
    return None


def _unsendable(params: SamplingParams) -> tuple[str, Exception] | None:
    """The field that has no encoding, and why: half a surrogate pair, an integer beyond 64 bits. Costs 0.4 us."""
    try:
        msgspec.msgpack.encode(params, enc_hook=repr)
    except (ValueError, OverflowError, RecursionError):
        for name in params.__struct_fields__:
            try:
                msgspec.msgpack.encode(getattr(params, name), enc_hook=repr)
            except (ValueError, OverflowError, RecursionError) as error:
                return name, error
    return None


def late_violation(params: SamplingParams, entry_limits: Mapping[str, int]) -> tuple[str, str, Any] | None:
    """As `violation`, of what vLLM adds to `params` after its own checks: end tokens, and the tokens of words."""
    stops = len(params.all_stop_token_ids) if params.min_tokens else 0
    if stops > (limit := entry_limits.get("stop_token_ids", stops)):
        message = f"stop_token_ids has {stops} entries, with the model's end tokens; this engine takes at most {limit}"
        return message, "stop_token_ids", stops
    words = params.bad_words_token_ids or []
    if len(words) > (limit := entry_limits.get("bad_words", len(words))):
        message = f"bad_words has {len(words)} entries, with a space before them too; this engine takes at most {limit}"
        return message, "bad_words", len(words)
    tokens = sum(map(len, words))
    if tokens > (limit := entry_limits.get("bad_words_tokens", tokens)):
        return f"bad_words has {tokens} tokens; this engine takes at most {limit}", "bad_words", tokens
    return None


def grammar_violation(wanted: StructuredOutputsParams) -> str | None:
    """Why a grammar is refused for its size or emptiness, or None. Cheap: nothing is compiled."""
    for name in ("json", "grammar", "choice", "structural_tag"):  # an empty regex is one: it takes the empty text
        value = getattr(wanted, name)
        if value is not None and (value == [] or (isinstance(value, str) and not value.strip())):
            return f"{name} is empty; leave it out, or give it a value"
    if wanted.json_object is False:
        return "json_object is false; leave it out, or set it to true"
    text = _text(wanted)
    if len(text) > MAX_GRAMMAR_CHARS:
        return f"the grammar or schema has {len(text)} characters; at most {MAX_GRAMMAR_CHARS} are taken"
    for kind, part in _parts(wanted):
        if kind == "choice":
            if len(part) > MAX_CHOICE_CHARS:
                return f"a choice has {len(part)} characters; at most {MAX_CHOICE_CHARS} are taken"
            continue
        if len(part) > MAX_PATTERN_CHARS:
            return f"the {kind} has {len(part)} characters; at most {MAX_PATTERN_CHARS} are taken"
        if (depth := _depth(part)) > MAX_DEPTH:
            return f"the {kind} nests {depth} parentheses deep; at most {MAX_DEPTH} are taken"
        refusal = (
            grammar_size.grammar_violation(part) if kind == "grammar" else grammar_size.regex_violation(part, kind)
        )
        if refusal is not None:
            return refusal
    for schema in (wanted.json, wanted.structural_tag):
        if schema is not None and (refusal := grammar_size.schema_violation(grammar_size.parsed(schema))) is not None:
            return refusal
    return None


def _text(wanted: StructuredOutputsParams) -> str:
    value = wanted.json or wanted.regex or wanted.choice or wanted.grammar or wanted.structural_tag or ""
    return value if isinstance(value, str) else json.dumps(value)


def _parts(wanted: StructuredOutputsParams) -> Iterator[tuple[str, str]]:
    """The regular expressions, grammars and choices in it, with what they are."""
    if wanted.regex:
        yield "regex", wanted.regex
    if wanted.grammar:
        yield "grammar", wanted.grammar
    for choice in wanted.choice or ():
        yield "choice", choice
    todo: list[Any] = [wanted.json, wanted.structural_tag]
    while todo:
        value = todo.pop()
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                continue  # vLLM has a 400 of its own for it
        if isinstance(value, dict):
            for key, inner in value.items():
                if isinstance(inner, dict | list):
                    todo.append(inner)
                elif key == "pattern" and isinstance(inner, str):
                    yield "pattern", inner
                elif key == "grammar" and isinstance(inner, str):
                    yield "grammar", inner
                elif key == "const" and isinstance(inner, str):
                    yield "choice", inner
            if isinstance(patterns := value.get("patternProperties"), dict):
                yield from (("pattern", pattern) for pattern in patterns)
            if isinstance(names := value.get("enum"), list):
                yield from (("choice", name) for name in names if isinstance(name, str))
        elif isinstance(value, list):
            todo += [inner for inner in value if isinstance(inner, dict | list)]


def _depth(text: str) -> int:
    deepest = depth = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, depth)
    return deepest


def xgrammar_refusal(params: SamplingParams) -> str | None:
    """Why xgrammar cannot compile what `params` wants, or None.

    With backend "auto", vLLM turns to a second library for what the first refuses, but an engine keeps the library of
    its first structured request for good: the same request would be answered or fail with 500, by luck of the replica.
    """
    from vllm.v1.structured_output.backend_xgrammar import validate_xgrammar_grammar

    try:
        validate_xgrammar_grammar(params)
    except (VLLMValidationError, ValueError, TypeError, KeyError, RecursionError) as error:
        text = " ".join(str(error).split())[:500]
        if "not supported by xgrammar" not in text or (keyword := _unsupported_keyword(params)) is None:
            return text
        way_out = "leave it out"
        if keyword in GUIDANCE_KEYWORDS:
            way_out += ", or start the fleet with structured_outputs_config.backend=guidance, which takes it"
        return f"{keyword} is not supported by xgrammar in this place of the schema; {way_out}"
    wanted = params.structured_outputs
    assert wanted is not None
    text = _text(wanted)
    may_recurse = bool(wanted.grammar) or (bool(wanted.json) and '"$ref"' in text)
    if may_recurse and len(text) <= MAX_PROBED_CHARS and not _has_sentence(text, is_json=bool(wanted.json)):
        return "the grammar is satisfied by no text at all: its root refers to itself without an end"
    return None


def _unsupported_keyword(params: SamplingParams) -> str | None:
    """The keyword of a JSON schema without which xgrammar would take the part of the schema that has it."""
    from vllm.v1.structured_output.backend_xgrammar import has_xgrammar_unsupported_json_features

    assert params.structured_outputs is not None
    todo: list[Any] = [grammar_size.parsed(params.structured_outputs.json)]
    found = None
    while todo:
        part = todo.pop()
        if isinstance(part, list):
            todo += part
        elif isinstance(part, dict):
            if has_xgrammar_unsupported_json_features(part):
                for key in part:
                    rest = {name: value for name, value in part.items() if name != key}
                    if key not in NAMED_KEYWORDS or has_xgrammar_unsupported_json_features(rest):
                        continue
                    found = key
            todo += part.values()
    return found


def _has_sentence(text: str, *, is_json: bool) -> bool:
    """Whether a first character is allowed, found with a vocabulary of the 256 bytes: costs milliseconds."""
    import xgrammar
    from vllm.v1.structured_output.utils import grammar_is_likely_lark

    if not is_json and grammar_is_likely_lark(text):
        return True
    parse = xgrammar.Grammar.from_json_schema if is_json else xgrammar.Grammar.from_ebnf
    vocabulary = [bytes([i]) for i in range(256)] + [b"</s>"]
    info = xgrammar.TokenizerInfo(vocabulary, xgrammar.VocabType.RAW, stop_token_ids=[256])
    compiled = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False).compile_grammar(parse(text))
    allowed = xgrammar.allocate_token_bitmask(1, len(vocabulary))
    xgrammar.GrammarMatcher(compiled).fill_next_token_bitmask(allowed, 0)
    return bool(allowed.any())


def twin_violation(params: SamplingParams) -> tuple[str, str, Any] | None:
    """(message, parameter, value) of what a simulated replica cannot answer, or None."""
    for name in ("logprobs", "prompt_logprobs", "structured_outputs"):
        value = getattr(params, name)
        if value is not None:
            return f"the replicas are simulated: their tokens have no {name}; leave it out", name, None
    return None


def install(
    config: VllmConfig | None = None, *, entry_limits: Mapping[str, int] | None = None, is_twin: bool = False
) -> None:
    """Check these limits wherever this process makes `SamplingParams`: before an answer starts, so as 400.

    Without the engine's `config` the limits that depend on it are left out. `entry_limits`: as in `violation`; which
    model runner there is only a replica knows.
    """
    if getattr(SamplingParams._verify_args, "is_kervan", False):
        return
    from vllm.platforms import current_platform

    of_runner = entry_limits or {}
    is_xgrammar = config is not None and config.structured_outputs_config.backend in ("auto", "xgrammar")
    # vLLM 0.32's CPU kernels of adapters mistake prompt positions for requests, and the engine dies.
    breaks_prompt_logprobs = config is not None and config.lora_config is not None and current_platform.is_cpu()
    verify = SamplingParams._verify_args

    @functools.wraps(verify)
    def verify_with_limits(self: SamplingParams) -> None:
        verify(self)
        broken = violation(self, of_runner) or (twin_violation(self) if is_twin else None)
        if broken is None and breaks_prompt_logprobs and self.prompt_logprobs is not None:
            message = "prompt_logprobs (also: echo with logprobs) kill a CPU engine with enable_lora; leave them out"
            broken = message, "prompt_logprobs", self.prompt_logprobs
        if broken is None and self.structured_outputs is not None:
            refusal = grammar_violation(self.structured_outputs)
            if refusal is None and is_xgrammar:
                refusal = xgrammar_refusal(self)
            if refusal is not None:
                broken = refusal, "structured_outputs", None
        if broken is not None:
            message, parameter, value = broken
            raise VLLMValidationError(message, parameter=parameter, value=value)

    verify_with_limits.is_kervan = True  # type: ignore[attr-defined]
    SamplingParams._verify_args = verify_with_limits
    for method in ("update_from_generation_config", "update_from_tokenizer"):
        setattr(SamplingParams, method, _limited(getattr(SamplingParams, method), of_runner))


def _limited(update: Callable[..., None], entry_limits: Mapping[str, int]) -> Callable[..., None]:
    """vLLM's addition to parameters, and what it adds checked."""

    @functools.wraps(update)
    def update_within_limits(self: SamplingParams, *args: Any, **kwargs: Any) -> None:
        update(self, *args, **kwargs)
        if (broken := late_violation(self, entry_limits)) is not None:
            message, parameter, value = broken
            raise VLLMValidationError(message, parameter=parameter, value=value)

    return update_within_limits
