"""What `kervan` says when something is wrong that needs no Ray to know."""

import contextlib
import http.server
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from harness.command_line import Kervan

from kervan import __version__, cli
from kervan.cli import bench
from kervan.config import key_file
from kervan.serve import cluster

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_attention_heads": 14,
    "num_hidden_layers": 2,
}


@pytest.fixture(autouse=True)
def no_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty memory of fleets, and no way to start or reach a cluster."""

    def reached(*_: Any, **__: Any) -> None:
        raise AssertionError("this error must come before a cluster is touched")

    monkeypatch.setenv("KERVAN_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("KERVAN_API_KEY", raising=False)
    monkeypatch.setattr(cluster, "start_local_ray", reached)
    monkeypatch.setattr(cluster, "connect", reached)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory that passes for a model of 14 heads and 2 layers."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(LLAMA))
    (directory / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (directory / "tokenizer.json").write_text("{}")
    return directory


@pytest.fixture
def kervan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Kervan:
    return Kervan(monkeypatch, capsys)


# ---- up: the model


def test_no_model(kervan: Kervan) -> None:
    assert "give MODEL, a Hugging Face id or a local directory" in kervan.fails("up")
    assert "give MODEL" in kervan.fails("up", "")


def test_a_missing_model_directory(kervan: Kervan, tmp_path: Path) -> None:
    error = kervan.fails("up", tmp_path / "none")
    assert str(tmp_path / "none") in error
    assert "check the path, or give an id such as" in error


@pytest.mark.parametrize(
    ("config", "fix"),
    [
        pytest.param(None, "give a directory in Hugging Face format", id="missing"),
        pytest.param("{not json", "fetch the model again", id="invalid JSON"),
        pytest.param("[]", "fetch the model again", id="no object"),
        pytest.param("{}", "copy them from the model's page", id="no fields"),
        pytest.param('{"model_type": "llama"}', "lacks architectures; copy them", id="one field missing"),
    ],
)
def test_a_bad_model_directory(kervan: Kervan, tmp_path: Path, config: str | None, fix: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    assert fix in kervan.fails("up", tmp_path)


def test_a_directory_without_weights(kervan: Kervan, model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert "--engine-arg load_format=dummy for random ones" in kervan.fails("up", model)


def test_files_that_vllm_could_not_load_are_told_before_anything_starts(kervan: Kervan, model: Path) -> None:
    (model / "model.safetensors").write_bytes((20).to_bytes(8, "little") + b"{}")
    assert "model.safetensors is cut off: it has 10 bytes, and its header alone 20" in kervan.fails("up", model)
    assert "engine argument dtype='foo' is not one of auto" in kervan.fails("up", model, "--engine-arg", "dtype=foo")
    (model / "tokenizer.json").unlink()
    assert "has no tokenizer" in kervan.fails("up", model, "--engine-arg", "load_format=dummy")


# ---- up: options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param(["--engine-arg", "max_model_length=4"], "did you mean max_model_len", id="misspelt engine arg"),
        pytest.param(["--engine-arg", "qqqq=4"], "vllm serve --help=all", id="unknown engine arg"),
        pytest.param(["--engine-arg", "tensor_parallel_size=2"], "use --tp", id="engine arg owned"),
        pytest.param(["--engine-arg", "tensor-parallel-size=2"], "use --tp", id="engine arg owned, hyphens"),
        pytest.param(["--engine-arg", "port=9000"], "use --port", id="port owned"),
        pytest.param(["--engine-arg", "foo"], "write for example --engine-arg max_model_len=4096", id="no equals sign"),
        pytest.param(["--engine-arg", "hf_overrides={a:1}"], "quote it for the shell", id="broken JSON"),
        pytest.param(["--env", "FOO"], "--env 'FOO' has no key=value form; write for example --env HF_", id="env without equals sign"),
        pytest.param(
            ["--env", "KERVAN_NOTICES_WATCH=asw"], "is not one of auto, aws, gcp, azure, signal", id="notices of nobody"
        ),
        pytest.param(["--env", "KERVAN_NOTICES_X=1"], "known ones: KERVAN_NOTICES_WATCH", id="unknown setting of notices"),
        pytest.param(["--tp", "4"], "use 1, 2, 7 or 14 (--tp)", id="tp does not divide the heads"),
        pytest.param(["--tp", "0"], "outside 1..64", id="tp 0"),
        pytest.param(["--pp", "3"], "use at most --pp 2", id="pp exceeds the layers"),
        pytest.param(["--twin", "FOO"], "write for example --twin speed=2", id="twin without equals sign"),
        pytest.param(["--env", "A B=1"], "'A B' is no name of an environment variable", id="env with a space"),
        pytest.param(["--ep", "2"], "use --ep 1, or --tp 2 --ep 2", id="ep without tp"),
        pytest.param(["--tp", "4", "--ep", "2"], "use --ep 1 or --ep 4", id="ep beside tp"),
        pytest.param(["--replicas", "0"], "give at least 1, or kervan down", id="no replicas"),
        pytest.param(["--api-key", ""], "--api-key is empty", id="empty key"),
        pytest.param(["--api-key", "good", "--api-key", " "], "--api-key: key 2 of 2 is empty", id="blank key"),
        pytest.param(["--api-key", "secret "], "which clients cannot send", id="key with a space at its end"),
        pytest.param(["--replicas", "-1"], "'-1' is below 0; write for example 2 or 1..4", id="negative replicas"),
        pytest.param(["--port", "99999"], "port=99999 is outside 1..65535", id="port too large"),
        pytest.param(["--name", "My Fleet"], "use 1 to 40 lower-case letters, digits and hyphens", id="name"),
        pytest.param(["--host", "203.0.113.7"], "use 127.0.0.1, or 0.0.0.0 for all (--host)", id="host elsewhere"),
    ],
)  # fmt: skip
def test_wrong_options(kervan: Kervan, model: Path, options: list[str], words: str) -> None:
    assert words in kervan.fails("up", model, *options)


def test_a_port_in_use(kervan: Kervan, model: Path) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as a gateway has it
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        error = kervan.fails("up", model, "--port", port)
    assert f"port {port} of 127.0.0.1 cannot be used" in error
    assert "choose another, for example --port" in error


# ---- up: config files


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("replica: 2", "has unknown setting 'replica'; did you mean 'replicas'?", id="misspelt key"),
        pytest.param("port: '8000'", "give a whole number", id="wrong type"),
        pytest.param("engine_args: {max_model_length: 4}", "did you mean max_model_len", id="misspelt engine arg"),
        pytest.param("engine_args: {pipeline_parallel_size: 2}", "use --pp", id="engine arg owned"),
        pytest.param("tp: [", "cannot be read", id="broken YAML"),
        pytest.param("words", "write lines such as 'tp: 2'", id="no mapping"),
        pytest.param("api_keys: ['']", "api_keys is empty", id="empty key"),
        pytest.param(
            "api_keys: ['good', ' also ']", "key 2 of 2 begins or ends with white space", id="key with spaces"
        ),
        pytest.param('api_keys: ["line\\n"]', "has a line break", id="key with a line break"),
        pytest.param("replicas: 0", "give at least 1", id="no replicas"),
        pytest.param('env: {A: "x\\0"}', "has a null character", id="null character in the environment"),
    ],
)
def test_a_wrong_config_file(kervan: Kervan, model: Path, tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text(text)
    error = kervan.fails("up", model, "--config", path)
    assert words in error


def test_a_missing_config_file(kervan: Kervan, model: Path, tmp_path: Path) -> None:
    error = kervan.fails("up", model, "--config", tmp_path / "none.yaml")
    assert "none.yaml does not exist; check the path given to --config" in error


@pytest.mark.parametrize("value", ["", "  "])
def test_an_empty_variable_opens_no_fleet(
    kervan: Kervan, model: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("KERVAN_API_KEY", value)
    assert "KERVAN_API_KEY is empty" in kervan.fails("up", model)
    for command in (("bench", "http://127.0.0.1:1"), ("chaos", "http://127.0.0.1:1", "--kill-every", "1s")):
        assert "KERVAN_API_KEY is empty" in kervan.fails(*command)
        assert "--api-key is empty" in kervan.fails(*command, "--api-key", value)


def test_options_win_over_the_file(kervan: Kervan, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(f'model = "{model}"\ntp = 4\n[engine_args]\nmax_model_length = 4\n')
    assert "'max_model_length'" in kervan.fails("up", "--config", path)
    path.write_text(f'model = "{model}"\ntp = 4\n')
    assert "tp=4 does not divide" in kervan.fails("up", "--config", path)
    assert "tp=3 does not divide" in kervan.fails("up", "--config", path, "--tp", 3)


# ---- files that commands write


@pytest.mark.parametrize(
    ("option", "command"),
    [
        ("--html", ["bench", "http://127.0.0.1:1"]),
        ("--record", ["bench", "http://127.0.0.1:1"]),
        ("--record", ["chaos", "http://127.0.0.1:1", "--kill-every", "1s"]),
        ("--plot", ["plan", "org/model", "--gpu", "H200"]),
        ("--output", ["calibrate"]),
        ("--calibration", ["calibrate"]),
        ("--log-dir", ["calibrate"]),
    ],
)
def test_a_place_that_is_not_there_is_refused_before_any_work(
    kervan: Kervan, tmp_path: Path, option: str, command: list[str]
) -> None:
    there = tmp_path / "misspelt"
    error = kervan.fails(*command, option, there / "result.json")
    assert f"{option} {there}" in error
    assert f"directory {there} does not exist" in error.replace("/result.json does", " does")
    assert not there.exists()
    file = tmp_path / "file"
    file.touch()
    inside = file if option == "--log-dir" else file / "result.json"
    assert "is a file, not a directory" in kervan.fails(*command, option, inside)


@pytest.mark.parametrize("where", ["sleep 1000", "http://a b:1", "http://h/a\tb", "ssh://h", "h:x", ""])
@pytest.mark.parametrize("command", [["bench"], ["bench", "http://127.0.0.1:1", "--against"]], ids=" ".join)
def test_what_is_neither_a_url_nor_a_command_is_refused(kervan: Kervan, command: list[str], where: str) -> None:
    error = kervan.fails(*command, where)
    assert repr(where) in error
    assert "or a command that starts a server, with {port} in it" in error


# ---- fleets that are not there


@pytest.mark.parametrize(
    "arguments",
    [["status"], ["status", "--json"], ["down"], ["scale", "2"], ["scale", "1..4"], ["status", "--name", "chat"],
     ["autoscale"], ["autoscale", "--dry-run", "--policy", "ray"], ["down", "--name", "chat"]],
    ids=" ".join,
)  # fmt: skip
def test_an_unknown_fleet(kervan: Kervan, arguments: list[str]) -> None:
    name = "chat" if "chat" in arguments else "default"
    error = kervan.fails(*arguments, status=1)
    assert f"no fleet '{name}' was started from this machine" in error
    assert "start one: kervan up MODEL" in error


def test_an_unknown_name_lists_the_known_ones(kervan: Kervan) -> None:
    cluster.remember(cluster.Remembered("chat", "127.0.0.1:6379", "http://127.0.0.1:8000"))
    cluster.remember(cluster.Remembered("code", "127.0.0.1:6379", "http://127.0.0.1:8001"))
    assert "fleets started here: chat, code (--name)" in kervan.fails("status", status=1)


@pytest.mark.parametrize(
    ("deadline", "told"),
    [
        ("1" + 300 * "0" + "s", "'10000000000000000000000000000...0000000s' is more than 10 years"),
        (400 * "9" + "h", "'9999"),
        ("1000000001", "'1000000001' is more than 10 years"),
        ("soon", "'soon'"),
    ],
    ids=["more than anybody waits", "more than a float takes", "more than Ray takes", "no duration"],
)
def test_a_drain_needs_a_deadline_that_can_be(kervan: Kervan, deadline: str, told: str) -> None:
    error = kervan.fails("drain", "on-demand-2c9867", "--deadline", deadline)
    assert f"--deadline {told}" in error
    assert "like " in error


# ---- usage


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["up", "m", "--no-such-option"],
        ["up", "m", "--tp", "two"],
        ["up", "m", "--ingress", "nginx"],
        ["up", "m", "another"],
        ["scale"],
        ["scale", "two"],
        ["scale", "--", "-1"],
        ["scale", "3..1"],
        ["autoscale", "--policy", "slo"],
        ["autoscale", "--dry-run", "--policy", "magic"],
        ["up", "m", "--replicas", "8..1"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_told_in_one_line(kervan: Kervan, arguments: list[str]) -> None:
    command = arguments[0] if arguments[0] in cli.COMMANDS else ""
    assert kervan.fails(*arguments).endswith(f"; see {f'kervan {command}'.strip()} --help")


def misused(name: str) -> Iterator[tuple[list[str], str]]:
    """Ways to use a command wrongly, each with what must be said of it."""
    command = cli.cli.get_command(click.Context(cli.cli), name)
    assert command is not None
    required = ["x" for one in command.params if isinstance(one, click.Argument) and one.required]
    if required:
        yield [], " is missing"
    yield [*required, "--qqqqqqqq"], f"kervan {name} has no option --qqqqqqqq"
    for one in command.params:
        if not isinstance(one, click.Option):
            continue
        option = one.opts[-1]
        yield [*required, f"{option}q"], f"has no option {option}q (did you mean {option}?)"
        if one.is_flag:
            yield [*required, f"{option}=1"], f"'{option}' does not take a value"
            continue
        yield [*required, option], f"'{option}' requires an argument"
        if isinstance(one.type, click.Choice):
            yield [*required, option, "x"], f"{option} 'x' is not "
        elif isinstance(one.type, click.types.IntParamType | click.types.FloatParamType):
            yield [*required, option, "x"], f"{option} 'x' is not a"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_tells_wrong_usage_in_one_line(kervan: Kervan, name: str) -> None:
    for arguments, told in misused(name):
        error = kervan.fails(name, *arguments)
        assert told in error
        assert error.endswith(f"; see kervan {name} --help")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["plna"], "no command 'plna' (did you mean plan?); see kervan --help"),
        (
            ["scale", "two"],
            "REPLICAS 'two' is neither a number nor a range; write for example 2 or 1..4; see kervan scale --help",
        ),
        (["plan", "m", "--gpus", "0"], "--gpus 0 is not a whole number from 1 to 65,536; see kervan plan --help"),
        (["keys", "list", "--file", "/"], "--file '/' is a directory; see kervan keys list --help"),
        (["plan", "a", "b"], "got unexpected extra argument (b); see kervan plan --help"),
        (["fault", "x"], "argument KIND is missing: one of slow, hang, crash, kv-pressure, none; see"),
        (["cluster", "render", "--target", "slurm"], "option --out is missing; see kervan cluster render --help"),
        (["cluster", "cost", "--gpu", "H200", "--days", "nan"], "--days 'nan' is not a number from 0.1 to 365; see"),
        (
            ["simulate", "m", "--losses", "5"],
            "--losses '5' is not a number above 0 and a unit of time; write for example --losses 0.01/h",
        ),
        (["simulate", "m", "--losses", "x"], "write for example --losses 0.01/h"),
        (["bench", "http://x", "--burstiness", "nan"], "--burstiness 'nan' is not a number that can be"),
        (["bench", "http://x", "--fail-below", "inf"], "--fail-below 'inf' is not a number that can be counted"),
        (["fault", "x", "no"], "KIND 'no' is not one of 'slow', 'hang', 'crash', 'kv-pressure', 'none'; see"),
        (
            ["up", "--max-model-len", "9"],
            "no option --max-model-len (if it is vLLM's: --engine-arg max_model_len=VALUE)",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_says_what_would_be_right(kervan: Kervan, arguments: list[str], told: str) -> None:
    assert told in kervan.fails(*arguments)


def test_no_command_shows_the_commands(kervan: Kervan) -> None:
    code, out, err = kervan.run()
    assert code == 2
    assert all(name in out + err for name in cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(kervan: Kervan, name: str) -> None:
    code, out, err = kervan.run(name, "--help")
    assert (code, err) == (0, "")
    assert out.startswith("Usage: ")
    for section in out.split("\n\n"):  # more than a screen can show would need sections, as bench has
        assert len([line for line in section.splitlines() if line.strip().startswith("-")]) <= 16


def test_the_sections_of_bench_have_all_its_options() -> None:
    listed = " ".join(bench.SECTIONS.values()).split()
    known = [parameter.opts[-1] for parameter in bench.bench.params if parameter.param_type_name == "option"]
    assert sorted(listed) == sorted([*known, "--help"])


def test_the_version(kervan: Kervan) -> None:
    assert kervan.run("--version") == (0, f"kervan, version {__version__}\n", "")


def test_debug_shows_the_traceback(kervan: Kervan, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="check the path"):
        kervan.run("--debug", "up", tmp_path / "none")


def test_a_real_process_says_it_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kervan", "up", str(tmp_path / "none")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: model ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("switch", [[], ["-u"]], ids=["buffered", "unbuffered"])
def test_a_full_disk_behind_stdout_is_told_in_one_line(tmp_path: Path, switch: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, *switch, "-m", "kervan", "keys", "add", "web", "--file", str(tmp_path / "keys.yaml")],
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert "stdout cannot be written (No space left on device), and nobody has seen the new key" in done.stderr
        assert key_file.read(tmp_path / "keys.yaml") == []
        done = subprocess.run(
            [sys.executable, *switch, "-m", "kervan", "keys", "list", "--file", str(tmp_path / "keys.yaml"), "--json"],
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (
        1, "error: stdout cannot be written (No space left on device); write it elsewhere\n"
    )  # fmt: skip


NAMING = [
    ["profile"], ["usage"], ["top"], ["status"], ["autoscale"], ["explain", "x"], ["drain", "r"], ["scale", "2"],
    ["down"], ["doctor"], ["fault", "r", "hang"], ["rotate-keys"], ["up", "m"],
]  # fmt: skip


@pytest.mark.parametrize("command", NAMING, ids=" ".join)
def test_names_and_addresses_that_cannot_be_are_refused_at_once(kervan: Kervan, command: list[str]) -> None:
    for name in ("A B", "UPPER", "", "x" * 47):
        assert f"--name {name!r} is no fleet's name; use 1 to 40" in kervan.fails(*command, "--name", name)
    for address in ("nowhere", "", "host:abc", ":6379", "h:99999", "h:0", "ray://h:10001"):
        assert f"--address {address!r} is not HOST:PORT; give" in kervan.fails(*command, "--address", address)


@contextlib.contextmanager
def answering(body: bytes) -> Iterator[str]:
    """The URL of a server that answers everything with `body`."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        serving = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01))
        serving.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            serving.join()


@pytest.mark.parametrize("body", [b"[]", b"{}", b"<html>", b"[" * 100_000], ids=["list", "object", "page", "deep"])
def test_explain_says_that_what_answers_is_no_gateway(kervan: Kervan, body: bytes) -> None:
    with answering(body) as url:
        told = f"error: what answers at {url} is no gateway; give the URL of one, like --url http://127.0.0.1:8000"
        assert kervan.fails("explain", "x", "--url", url, status=1) == told
        assert kervan.fails("explain", "x", "--url", url, "--json", status=1) == told


@pytest.mark.parametrize("body", [b"[]", b"{}", b"[" * 100_000], ids=["list", "object", "deep"])
def test_plot_says_that_what_answers_is_no_prometheus(kervan: Kervan, tmp_path: Path, body: bytes) -> None:
    with answering(body) as url:
        code, _, err = kervan.run("observe", "plot", "--prometheus", url, "--out", tmp_path / "x.svg")
    assert (code, err.splitlines()[-1].startswith("error: ")) == (1, True)
    assert f"what answers at {url} is no Prometheus" in err


# ---- pools


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--pool", "spot"), "--pool 'spot' has no NAME:COUNT form; write for example --pool spot:0..6"),
        (("--pool", "spot:"), "has no NAME:COUNT form"),
        (("--pool", "spot:0..6"), "add --pool on-demand:1"),
        (("--pool", "on-demand:1", "--pool", "on-demand:2"), "--pool on-demand is given twice, with 1 and 2"),
        (("--pool", "on-demand:1", "--pool", "spot:x"), "pool spot: 'x' is neither a number nor a range MIN..MAX"),
        (
            ("--pool", "on-demand:1", "--replicas", "1"),
            "--replicas 1 and --pool both set the number of replicas; give only",
        ),
    ],
)
def test_pools_that_make_no_sense(kervan: Kervan, model: Path, words: tuple[str, ...], message: str) -> None:
    assert message in kervan.fails("up", model, *words)


def test_scale_takes_replicas_or_pools(kervan: Kervan) -> None:
    error = kervan.fails("scale", 2, "--pool", "spot:0..2")
    assert "2 and --pool both set the number of replicas; give only the pools" in error
