"""SLOs, lengths and traces as users write them."""

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kervan.config.workload import Slo, TraceRow, parse_lengths, parse_slo, read_trace
from kervan.errors import ConfigError


def test_slo() -> None:
    slo = parse_slo("ttft=1s, tpot=50ms")
    assert slo == Slo(ttft_s=1.0, tpot_s=0.05)
    assert slo.is_met(ttft_s=1.0, tpot_s=0.05, e2e_s=1e9)
    assert not slo.is_met(ttft_s=1.01, tpot_s=0.01, e2e_s=1)
    assert not slo.is_met(ttft_s=0.5, tpot_s=0.06, e2e_s=1)
    assert Slo().is_met(ttft_s=1e9, tpot_s=1e9, e2e_s=1e9)
    assert parse_slo(str(slo)) == slo


@pytest.mark.parametrize(
    ("text", "words"),
    [("ttft", "none of ttft="), ("itl=3ms", "none of"), ("ttft=1s,ttft=2s", "twice"), ("e2e=0s", "never be met"), ("tpot=50", "write tpot=50ms or tpot=50s"),
     ("tpot=fast", "not a duration")],
)  # fmt: skip
def test_bad_slo(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_slo(text)


@pytest.mark.parametrize(
    ("text", "mean", "minimum", "maximum"),
    [("64", 64, 64, 64), ("32..96", 64, 32, 96), ("100@1,300@3", 250, 100, 300)],
)
def test_lengths(text: str, mean: float, minimum: int, maximum: int) -> None:
    lengths = parse_lengths(text)
    assert (lengths.mean, lengths.minimum, lengths.maximum) == (mean, minimum, maximum)
    drawn = [lengths.sample(random.Random(i)) for i in range(2000)]
    assert (min(drawn), max(drawn)) == (minimum, maximum)
    assert sum(drawn) / 2000 == pytest.approx(mean, rel=0.05)


def test_continuous_lengths_stay_in_their_bounds() -> None:
    lengths = parse_lengths("lognormal:median=200,sigma=1,max=1000")
    drawn = [lengths.sample(random.Random(i)) for i in range(4000)]
    assert min(drawn) >= 1
    assert max(drawn) == 1000
    assert sorted(drawn)[2000] == pytest.approx(200, rel=0.1)
    assert lengths.mean == pytest.approx(sum(drawn) / 4000, rel=0.06)
    assert parse_lengths("normal:mean=50,std=0").sample(random.Random(0)) == 50


@pytest.mark.parametrize(
    "text", ["", "0", "-4", "4.5", "a", "9..3", "5@-1", "5@0", "exp:mean=4", "normal:mean=4", "1..20000000",
             "lognormal:median=0,sigma=1", "normal:mean=4,std=1,skew=2"],
)  # fmt: skip
def test_bad_lengths(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--isl .*write 64, 32\.\.512"):
        parse_lengths(text, "--isl")


@given(st.text(max_size=30))
def test_any_text_is_lengths_or_a_config_error(text: str) -> None:
    try:
        lengths = parse_lengths(text)
    except ConfigError:
        return
    assert lengths.minimum <= lengths.sample(random.Random(0)) <= lengths.maximum


AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:16:00,9,0
"""
MOONCAKE = """{"timestamp": 500, "input_length": 1030, "output_length": 5, "hash_ids": [0, 7, 8]}
{"timestamp": 1500, "input_length": 512, "output_length": 3, "hash_ids": [0]}
"""


HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def test_azure_trace(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(AZURE)
    rows = list(read_trace(path))
    assert [(r.input_tokens, r.output_tokens) for r in rows] == [(374, 44), (396, 109), (9, 0)]
    assert [r.at_s for r in rows] == pytest.approx([0, 4.314579, 13.31941], abs=1e-5)


def test_mooncake_trace(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(MOONCAKE)
    assert list(read_trace(path)) == [TraceRow(0.0, 1030, 5, (0, 7, 8)), TraceRow(1.0, 512, 3, (0,))]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "begins with ''"),
        ("a,b\n1,2\n", "known are"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no rows"),
        (HEAD + "noon,1,1\n", r"line 2: TIMESTAMP 'noon' is not a time; write one like 2023-11-16 18:15:46"),
        (HEAD + ",1,1\n", "line 2: TIMESTAMP is empty; write one like"),
        (HEAD + "2023-02-31 00:00:00,1,1\n", "line 2: TIMESTAMP '2023-02-31 00:00:00' is not a time"),
        (HEAD + "\n2023-11-16 18:00:00,,1\n", "line 3: ContextTokens is empty; write a number of tokens like 1024"),
        (HEAD + "2023-11-16 18:00:00,9,many\n", "line 2: GeneratedTokens 'many' is not a whole number"),
        (HEAD + "2023-11-16 18:00:00,9\n", "line 2: 2 cells for 3 columns"),
        (HEAD + "2023-11-16 18:00:00,1,024,7\n", "line 2: 4 cells for 3 columns; .* without thousands separators"),
        (HEAD + '2023-11-16 18:00:00,9,"' + "7" * 200_000, "line 2: field larger than field limit"),
        ("TIMESTAMP,ContextTokens\n", "line 1: no column GeneratedTokens"),
        (AZURE + "2023-11-16 18:00:00,9,1\n", "line 5: its TIMESTAMP is 960.000 s before that of the row above; sort"),
        (AZURE.replace(",374,", ",0,"), "line 2: ContextTokens 0 is not from 1 to 10,000,000 tokens"),
        (AZURE.replace(",374,", ",99999999,"), "line 2: ContextTokens 99999999 is not from 1"),
        (
            '{"timestamp": 1, "input_length": 513, "output_length": 1, "hash_ids": [4]}\n',
            "1 hash_ids for .* 513, which",
        ),
        ('{"timestamp": 1}\n', "line 1: input_length is missing; write lines like {"),
        (
            '{"timestamp": 1, "input_length": "5", "output_length": 1}\n',
            "line 1: input_length is text, not a whole number",
        ),
        (
            '{"timestamp": 1, "input_length": null, "output_length": 1}\n',
            r"line 1: input_length is empty \(null\), not a whole number",
        ),
        ('{"timestamp": 1, "input_length": 1, "output_length": 1, "hash_ids": ["a"]}\n', r"hash_ids\[\d*\] is text"),
        ('{"timestamp": 1e999, "input_length": 1, "output_length": 1}\n', "line 1"),
        ("{" * 9000, "line 1: no valid JSON object"),
        ("{nonsense\n", "line 1"),
    ],
)
def test_bad_traces(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        list(read_trace(path))


def test_missing_trace(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing.csv does not exist; check the path given to --trace"):
        list(read_trace(tmp_path / "nothing.csv"))
    with pytest.raises(ConfigError, match=r"cannot be read .* give a CSV or JSONL file"):
        list(read_trace(tmp_path))
    (tmp_path / "packed.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(ConfigError, match=r"not a text file \(byte 0x8b is no UTF-8\); unpack it"):
        list(read_trace(tmp_path / "packed.gz"))


def test_azure_times_of_2024(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(
        "\ufeff" + HEAD + "2024-05-10 00:00:00.009930+00:00,9,1\n2024-05-10 00:00:01+00:00,9,1\n"
    )
    assert [(row.at_s, row.line) for row in read_trace(tmp_path / "t.csv")] == [(0.0, 2), (pytest.approx(0.99007), 3)]
