"""How large a grammar becomes when its counts are written out, and why one is refused for that. Compiles nothing.

What backends make of counts, measured on one core that others used too, xgrammar 0.2.8 and llguidance 1.7.6, a
vocabulary of 257 (a real one costs more), in a process with 8 GiB and 12 s of CPU time:

    what                                        xgrammar            guidance
    maxItems 2,000 / 100,000                    0.00 / 0.00 s       0.01 s / 1.5 s and 0.2 GiB
    arrays of up to 200 in three levels         0.00 s              0.01 s
    enum of 1,000, anyOf of 300                 0.01, 0.03 s        0.01, 0.05 s
    objects in 50 levels                        0.04 s              0.03 s
    maxLength 1,000,000                         0.07 s              0.00 s
    pattern ^[a-z]{0,2000}$ / {0,20000}         0.41 / over 12 s    0.00 / 0.00 s

So arrays cost the sum of their counts, whatever they nest in, and regular expressions and grammars are written out:
nested repetitions multiply.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

MAX_ITEMS = 10_000
MAX_ITEMS_SUM = 30_000
MAX_LENGTH = 1_000_000
MAX_REPEATS = 2_000
MAX_ALTERNATIVES = 4_000
MAX_NESTING = 100

_ITEMS = ("minItems", "maxItems", "minProperties", "maxProperties", "minContains", "maxContains")
_LENGTHS = ("minLength", "maxLength")
_DATA = ("const", "enum", "default", "examples", "example")
_ALTERNATIVES = ("enum", "anyOf", "oneOf", "allOf")
WAY_OUT = "leave it out, or check the answer yourself"

_TOKEN = re.compile(
    r"""(?P<skip>\s+|\#[^\n]*|//[^\n]*)
      | (?P<head>(?:(?<=\n)|\A)[?!]?[A-Za-z_][\w-]*(?:\.-?\d+)?\s*(?:::=|:(?!:)))
      | (?P<text>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')
      | (?P<regex>/(?:\\.|[^/\\\n])+/)
      | (?P<count>\{\s*\d*\s*(?:,\s*\d*\s*)?\}|~\s*\d+(?:\s*\.\.\s*\d+)?)
      | (?P<class>\[(?:\\.|[^\]\\\n])*\])
      | (?P<name>[A-Za-z_][\w-]*)
      | (?P<open>\()
      | (?P<close>\))
      | (?P<bar>\|)
      | (?P<other>.)""",
    re.VERBOSE,
)


def schema_violation(value: Any) -> str | None:
    """Why a JSON schema or a structural tag is refused for its counts or depth, or None."""
    items_sum = 0
    for keyword, count in _counts(value):
        if keyword == "nesting":
            return f"the schema nests {count} levels deep; at most {MAX_NESTING} are taken"
        limit = MAX_LENGTH if keyword in _LENGTHS else MAX_ALTERNATIVES if keyword in _ALTERNATIVES else MAX_ITEMS
        if count > limit:
            return f"{keyword} is {_number(count)}; at most {limit} is taken: {WAY_OUT}"
        items_sum += count if keyword in _ITEMS else 0
        if items_sum > MAX_ITEMS_SUM:
            return (
                f"the counts of items (minItems, maxItems, minProperties, maxProperties) sum up to {items_sum} or more "
                f"with {keyword}={_number(count)}; at most {MAX_ITEMS_SUM} are taken: leave some out"
            )
    return None


def regex_violation(pattern: str, kind: str = "regex") -> str | None:
    """Why a regular expression is refused for its repetitions, or None."""
    return _repeats_violation(*_regex_size(pattern), kind)


def grammar_violation(text: str) -> str | None:
    """Why a grammar in EBNF (GBNF) or Lark's format is refused for its repetitions, or None."""
    return _repeats_violation(*_grammar_size(text), "grammar")


def _repeats_violation(size: int, largest: int, length: int, kind: str) -> str | None:
    if size <= max(MAX_REPEATS, length):
        return None
    way_out = "use minLength and maxLength for long texts" if kind == "pattern" else "use * or + for long ones"
    return (
        f"the repetitions of the {kind} ({{n,m}}, up to {_number(largest)}) make {_number(size)} parts when they are "
        f"written out, nested ones multiplied; at most {MAX_REPEATS} are taken: {way_out}"
    )


def _number(count: float) -> str:
    return str(count) if count < 10**15 else f"{count:.3g}" if count < 10**300 else "over 1e300"


def _counts(value: Any) -> Iterator[tuple[str, int]]:
    """Each keyword that counts, with its count, of a schema and all within."""
    todo: list[tuple[Any, int]] = [(value, 1)]
    while todo:
        part, depth = todo.pop()
        if depth > MAX_NESTING:
            yield "nesting", depth
            return
        if isinstance(part, list):
            todo += [(inner, depth + 1) for inner in part if isinstance(inner, dict | list)]
        elif isinstance(part, dict):
            for key, inner in part.items():
                if isinstance(inner, int | float) and not isinstance(inner, bool):
                    if key in _ITEMS or key in _LENGTHS:
                        yield key, int(min(inner, 1e300)) if inner > 0 else 0
                elif isinstance(inner, list) and key in _ALTERNATIVES:
                    yield key, len(inner)
                # What is data is no schema, but a property may have such a name.
                if isinstance(inner, dict) or (isinstance(inner, list) and key not in _DATA):
                    todo.append((inner, depth + 1))


def _bounds(count: str) -> int:
    """The factor of `{n}`, `{n,}`, `{n,m}`, `~n` or `~n..m`: the larger number, at least 1."""
    return max([1, *(int(number[:300]) for number in re.findall(r"\d+", count))])


def _regex_size(pattern: str) -> tuple[int, int, int]:
    """Parts when all repetitions are written out, the largest count, and the parts as they are."""
    sums, last, largest, length = [0], 0, 1, 0
    i = 0
    while i < len(pattern):
        char = pattern[i]
        if char == "{" and (count := re.compile(r"\{\s*\d*\s*(,\s*\d*\s*)?\}").match(pattern, i)) is not None:
            factor = _bounds(count[0])
            largest = max(largest, factor)
            sums[-1] += last * (factor - 1)
            last *= factor
            i = count.end()
            continue
        if char == "(":
            sums.append(0)
        elif char == ")" and len(sums) > 1:
            last = max(1, sums.pop())
            sums[-1] += last
        elif char not in "|*+?^$":
            if char == "\\":
                i += 1
            elif char == "[":
                end = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL).match(pattern, i)
                i = end.end() - 1 if end is not None else i
            last = 1
            length += 1
            sums[-1] += 1
        i += 1
    return sum(sums), largest, length


def _grammar_size(text: str) -> tuple[int, int, int]:
    """As `_regex_size`, of all rules; a rule counts as often as it is used within repetitions of others."""
    rules: dict[str, list[tuple[str, str]]] = {"": []}
    body, length = rules[""], 0
    for match in _TOKEN.finditer(text):
        kind = str(match.lastgroup)
        if kind == "head":
            name = re.search(r"[A-Za-z_][\w-]*", match[0])
            assert name is not None
            body = rules.setdefault(name[0], [])
        elif kind != "skip":
            body.append((kind, match[0]))
            length += 1
    largest = 1
    sizes: dict[str, int] = {}

    def size(name: str, above: tuple[str, ...]) -> int:
        nonlocal largest
        if name in above or name not in rules or len(above) > MAX_NESTING:
            return 1
        if name not in sizes:
            sums, last = [0], 0
            for kind, word in rules[name]:
                if kind == "count":
                    factor = _bounds(word)
                    largest = max(largest, factor)
                    sums[-1] += last * (factor - 1)
                    last *= factor
                elif kind == "open":
                    sums.append(0)
                elif kind == "close":
                    last = sums.pop() if len(sums) > 1 else last
                    sums[-1] += last
                elif kind in ("text", "class"):
                    last = 1
                    sums[-1] += 1
                elif kind == "regex":
                    last, most, _ = _regex_size(word)
                    largest = max(largest, most)
                    sums[-1] += last
                elif kind == "name":
                    # Only what is repeated is written out; other uses share the rule.
                    last = size(word, (*above, name))
                    sums[-1] += 1
            sizes[name] = sum(sums)
        return sizes[name]

    return max(size(name, ()) for name in rules), largest, length


def parsed(value: Any) -> Any:
    """A schema that comes as text, as JSON; None if it is none."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None  # vLLM has a 400 of its own for it
