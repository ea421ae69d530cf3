"""Logs as JSON: what a line has, and that those who read vLLM's and Python's words in a log still find them."""

import json
import logging
import sys

import pytest
from click.testing import CliRunner

from kervan import logs
from kervan.cli import cli, render
from kervan.fleet import log_causes
from kervan.fleet.vllm import start_parts


def line(message: str, *args: object, about: dict[str, str] | None = None, **extra: object) -> dict[str, object]:
    record = logging.getLogger("kervan.test").makeRecord(
        "kervan.test",
        logging.WARNING,
        "",
        0,
        message,
        args,
        extra.pop("exc_info", None),
        extra=extra or None,  # type: ignore[arg-type]
    )
    text = logs.JsonFormatter(about).format(record)
    assert "\n" not in text
    found: dict[str, object] = json.loads(text)
    return found


def test_a_line_has_the_ids_of_its_process_and_of_what_it_is_about() -> None:
    found = line("%d streams", 3, about={"fleet": "chat", "gateway": "gw-1"}, replica="r-1", stream="s~1")
    assert found["message"] == "3 streams"
    assert (found["level"], found["logger"]) == ("WARNING", "kervan.test")
    assert {name: found[name] for name in ("fleet", "gateway", "replica", "stream")} == {
        "fleet": "chat", "gateway": "gw-1", "replica": "r-1", "stream": "s~1"
    }  # fmt: skip
    assert str(found["time"]).endswith("Z") and "request" not in found


def test_within_about_every_line_has_the_ids_and_what_it_names_itself_wins() -> None:
    with logs.about(lambda: {"request_id": "mine", "trace_id": "4bf9", "stream": "s"}):
        found = line("moved", stream="s~1", about={"gateway": "gw-1"})
    assert {name: found.get(name) for name in logs.IDS if name in found} == {
        "gateway": "gw-1", "request_id": "mine", "stream": "s~1", "trace_id": "4bf9"
    }  # fmt: skip
    assert "request_id" not in line("after it")


def failed_line() -> str:
    try:
        raise ValueError("no such layer")
    except ValueError:
        record = logging.getLogger("vllm").makeRecord("vllm", logging.ERROR, "", 0, "it failed", (), sys.exc_info())
    return logs.JsonFormatter().format(record)


def test_an_exception_is_in_its_line_and_the_cause_of_a_failed_start_is_found_in_it() -> None:
    text = failed_line()
    assert "ValueError: no such layer" in json.loads(text)["exception"]
    assert log_causes.causes(logs.plain(f"first\n{text}\n")) == ["ValueError: no such layer"]


def test_what_was_text_stays_as_it_was() -> None:
    text = 'INFO 11-29 x\n{"time": broken\n{"a": 1}\n'
    assert logs.plain(text).splitlines() == text.splitlines()
    assert logs.plain("plain\n") == "plain\n"


def test_the_parts_of_a_start_are_found_in_json_too() -> None:
    words = "Loading weights took 1.50 seconds"
    formatted = logs.JsonFormatter().format(logging.makeLogRecord({"msg": words, "name": "vllm", "levelno": 20}))
    phases = {"imports": 1.0, "config": 0.5, "engine": 3.0, "canary": 0.1}
    assert start_parts.split(phases, logs.plain(f"{formatted}\n")) == start_parts.split(phases, f"{words}\n")


@pytest.mark.parametrize(("value", "expected"), [("json", "json"), ("JSON ", "json"), ("text", "text"), ("", "text")])
def test_the_format_comes_with_the_environment(value: str, expected: str) -> None:
    assert logs.format_of({logs.VARIABLE: value}) == expected
    assert logs.format_of({}) == "text"


def test_progress_of_commands_is_json_when_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(logs.VARIABLE, "json")
    render.progress_lines()("starting 2 replicas")
    told = json.loads(capsys.readouterr().err)
    assert (told["message"], told["logger"]) == ("starting 2 replicas", "kervan.cli")
    monkeypatch.delenv(logs.VARIABLE)
    render.progress_lines()("starting")
    assert capsys.readouterr().err == "[  0.0 s] starting\n"


def test_the_option_is_for_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(logs.VARIABLE, "text")
    assert CliRunner().invoke(cli, ["--log-format", "json", "doctor", "--help"]).exit_code == 0
    assert logs.format_of() == "json"
