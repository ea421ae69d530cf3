import time
from typing import Any

import pytest

from kervan.fleet.vllm.grammar_size import grammar_violation, regex_violation, schema_violation

INTEGERS = {"type": "array", "items": {"type": "integer"}}


@pytest.mark.parametrize(
    ("schema", "refusal"),
    [
        (INTEGERS | {"maxItems": 10_000}, None),
        (INTEGERS | {"maxItems": 10_001}, "maxItems is 10001; at most 10000 is taken: leave it out"),
        (INTEGERS | {"maxItems": 1e9}, "maxItems is 1000000000; at most 10000"),
        (INTEGERS | {"minItems": 10**400}, "minItems is over 1e300; at most"),
        ({"type": "string", "maxLength": 10**9}, "maxLength is 1000000000; at most 1000000"),
        ({"type": "string", "minLength": 100_000}, None),
        ({"type": "object", "maxProperties": 10**6}, "maxProperties is 1000000"),
        ({"type": "object", "properties": {"a": {"items": [INTEGERS | {"maxItems": 10**6}]}}}, "maxItems"),
        ({"$defs": {"x": INTEGERS | {"minItems": 10**6}}, "$ref": "#/$defs/x"}, "minItems"),
        ({"prefixItems": [INTEGERS | {"maxItems": 9_000}] * 4}, "sum up to 36000 or more with maxItems=9000"),
        ({"format": {"json_schema": {"items": {}, "maxItems": 10**6}}}, "maxItems"),
        ({"enum": list(range(4_001))}, "enum is 4001; at most 4000"),
        ({"anyOf": [{}] * 4_001}, "anyOf is 4001"),
        ({"const": [{"maxItems": 10**9}]}, None),
        ({"properties": {"maxItems": {"type": "integer"}, "enum": {"type": "string"}}}, None),
        ({"maxItems": True}, None),
        ({"maxItems": "many"}, None),
        (None, None),
        ([], None),
    ],
)
def test_schemas(schema: Any, refusal: str | None) -> None:
    told = schema_violation(schema)
    assert (told is None) is (refusal is None)
    assert refusal is None or refusal in str(told)


def test_deep_schemas() -> None:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(30):
        schema = {"type": "object", "properties": {"a": schema}}
    assert schema_violation(schema) is None
    for _ in range(2_000):
        schema = {"items": schema}
    assert schema_violation(schema) == "the schema nests 101 levels deep; at most 100 are taken"


@pytest.mark.parametrize(
    ("pattern", "is_taken"),
    [
        ("[a-z]{0,1000}", True),
        ("[a-z]{0,3000}", False),
        ("[a-z]{3000}", False),
        ("[a-z]{3000,}", False),
        ("(ab){1,40}(cd){1,40}", True),
        ("((a{1,20}b){1,20}){1,20}", False),
        ("(a{100}|b{100}){15}", False),
        (r"a\{9999\}", True),
        ("[{9999}]", True),
        ("a{99999999999999999999999999}", False),
        ("a" * 5_000, True),
        (")))((({,}{}{", True),
    ],
)
def test_patterns(pattern: str, is_taken: bool) -> None:
    told = regex_violation(pattern, "pattern")
    assert (told is None) is is_taken
    assert is_taken or "use minLength and maxLength" in str(told)


@pytest.mark.parametrize(
    ("grammar", "is_taken"),
    [
        ('root ::= "a"{0,1000}', True),
        ('root ::= "a"{0,100000}', False),
        ("root ::= x{100}\nx ::= y{100}\ny ::= [a-z]", False),
        ('root ::= x y x y\nx ::= "a"{900}\ny ::= "b"{900}', True),
        ('root ::= root "a"{5} | "b"', True),
        ('root ::= ("a" | "b" ("c"){50}){50}', False),
        ('root ::= "a{9999}" [{9999}]', True),
        ("start: A~0..100000\nA: /x/", False),
        ("start: x{0,60}\nx: y{0,60}\ny: A\nA: /[a-z]{0,5}/", False),
        ("start: A\nA: /[a-z]{0,5000}/", False),
        ("start: A // {99999}\nA: /[a-z]/", True),
        ("x ::= " * 50, True),
    ],
)
def test_grammars(grammar: str, is_taken: bool) -> None:
    assert (grammar_violation(grammar) is None) is is_taken


def test_the_largest_that_is_looked_at_takes_little_time() -> None:
    begin_s = time.thread_time()
    regex_violation("(" * 4_000 + "a" + "){9,9}" * 4_000)
    grammar_violation('root ::= "a"' + ' ("b" | x{3})' * 600)
    grammar_violation("\n".join(f"r{i} ::= r{i + 1}{{2}}" for i in range(2_000)))
    assert time.thread_time() - begin_s < 5
