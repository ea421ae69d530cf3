"""Requests whose answers must not change by a move, for the random model of `kervan.demo`."""

import json
from collections.abc import Mapping
from typing import Any, Final

PROMPT = tuple(range(10, 40))
PENALTIES = {"presence_penalty": 2.0, "frequency_penalty": 2.0, "repetition_penalty": 1.2}
FEW = tuple(range(60, 76))
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 32, "ignore_eos": True}
# Of few tokens, each says what was said before: penalties that forget show at once.
TALKING: dict[str, Any] = {**GREEDY, **PENALTIES, "allowed_token_ids": FEW}
SEEDED: dict[str, Any] = {**TALKING, "temperature": 1.0, "seed": 3}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
GRAMMARS: Final[Mapping[str, dict[str, Any]]] = {
    "json schema": {"json": SCHEMA},
    "regex": {"regex": "[a-c]{4}-[0-9]{6}x{0,3}"},
    "choice": {"choice": ["a caravan of camels", "a caravan of traders", "an oasis"]},
    "ebnf": {"grammar": 'root ::= "so " item (", " item){3}\nitem ::= [a-z][a-z] | [0-9]'},
}
# vLLM bans the last token of a sequence after those before it, which may have been generated before a move.
BAD_WORDS = ["[\\]", "YZ", "Z[", "^_", "`a", "a`"]
_TAG = {"type": "tag", "begin": "<call>", "content": {"type": "json_schema", "json_schema": SCHEMA}, "end": "</call>"}
TAG = {"structural_tag": json.dumps({"type": "structural_tag", "format": _TAG})}
LONG_PROMPT = tuple(20 + i * 7 % 900 for i in range(100))
SAMPLINGS: Final[Mapping[str, dict[str, Any]]] = {
    "greedy": GREEDY,
    "presence penalty": {**GREEDY, "allowed_token_ids": FEW, "presence_penalty": 1.5},
    "frequency penalty": {**GREEDY, "allowed_token_ids": FEW, "frequency_penalty": 1.0},
    "repetition penalty": {**GREEDY, "allowed_token_ids": FEW, "repetition_penalty": 1.3},
    "logprobs": {**TALKING, "logprobs": 3},
    "logprob token ids": {**TALKING, "logprob_token_ids": [61, 65]},
    "logit bias": {**TALKING, "logit_bias": {60: 2.0, 61: -2.0}},
    "bad words": {**GREEDY, "allowed_token_ids": FEW, "bad_words": BAD_WORDS},
    "seed": {"temperature": 1.0, "seed": 7, "max_tokens": 32, "ignore_eos": True},
    "seed, top_p, top_k, min_p, penalties": {
        **PENALTIES,
        "temperature": 0.8,
        "seed": 11,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.01,
        "max_tokens": 32,
    },
}
