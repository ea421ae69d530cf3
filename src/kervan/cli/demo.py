"""`kervan demo`: a tiny model, two replicas, one streamed answer whose replica is killed, and nothing left behind.

Only the public command line and HTTP are used here (and a signal), so it proves what any client would see.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import FrameType
from typing import IO, Any, Final

import click

from kervan.demo import known_answers, make_demo_model, surge
from kervan.errors import ConfigError, FleetError
from kervan.ports import free_port

_MODEL_DIRECTORY: Final = Path(".demo/model")
_QUESTION: Final = "What happens when a replica dies?"
_STOP_S: Final = 120.0
_REPLY_S: Final = 60.0
_LOOK_S: Final = 2.0
_SMALL_S: Final = 180.0


@click.command()
@click.argument("what", type=click.Choice(["replica-loss", "autoscale"]), default="replica-loss")
@click.option(
    "--ask",
    default=_QUESTION,
    metavar="TEXT",
    show_default=True,
    help="What the model is asked; it knows about fifty answers, for one to 'What is tensor parallelism?'.",
)
@click.pass_context
def demo(ctx: click.Context, what: str, ask: str) -> None:
    """Serve a tiny model on two CPU replicas, kill the one that is answering, see the answer continue, and stop.

    autoscale: let simulated replicas follow a load that rises and falls, in about two minutes.
    """  # fmt: skip
    if not ask.strip():
        raise ConfigError("--ask is empty; name a question, for example 'What is tensor parallelism?'")
    if what == "autoscale" and ctx.get_parameter_source("ask") is not click.core.ParameterSource.DEFAULT:
        raise ConfigError("--ask goes with replica-loss: nobody reads the answers of autoscale; leave it out")
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError("the demo's gateways run vLLM's server, and vLLM is not installed: pip install 'kervan[cpu]'")
    if what == "autoscale":
        _autoscale()
    else:
        _replica_loss(ask)


def _autoscale() -> None:
    """A surge on a fleet of twins: what is asked, how many replicas there are, and why."""
    name = f"demo-{os.getpid()}"
    say = _clock()
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with _sigterm_unwinds(), tempfile.TemporaryDirectory(prefix="kervan-demo-") as place:
        model, settings = surge.write(Path(place))
        result = Path(place) / "bench.json"
        try:
            say(f"fleet: Ray and 1 to {surge.MOST} simulated replicas of an 8B model on H200 GPUs")
            _kervan(
                *("up", str(model), "--config", str(settings), "--gateways", "1", "--detach"),
                *("--port", str(port), "--name", name),
            )
            say(f"load: {surge.STAGES} (requests/s@time), {surge.OUTPUT_TOKENS} tokens each")
            load = ["bench", url, "--stages", surge.STAGES, "--isl", str(surge.PROMPT_TOKENS), "--osl",
                    str(surge.OUTPUT_TOKENS), "--json"]  # fmt: skip
            with result.open("wb") as written, _running(load, written) as bench:
                begin_s = time.time()
                seen = 0
                while bench.poll() is None:
                    status = _status("127.0.0.1", port)
                    told = [text for at_s, text in surge.changes(status) if at_s >= begin_s]
                    for text in told[seen:]:
                        say(f"  {text}")
                    seen = len(told)
                    say(surge.line(status))
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        bench.wait(_LOOK_S)
            if bench.returncode != 0:
                raise _failed(load, bench.returncode)
            say(f"wait until it is small again: {surge.line(_status('127.0.0.1', port))}")
            _until_small(port, say)
            told = json.loads(result.read_text())
            requests = told["requests"]
            say(f"{requests['ok']} requests whole, {requests['errors']} failed; the last changes and their reasons:")
            _kervan("autoscale", "--name", name)
        finally:
            say("stopping the fleet")
            _kervan("down", "--name", name, must=sys.exc_info()[0] is None)
        say("stopped")


def _until_small(port: int, say: Callable[[str], None]) -> None:
    """Until one replica is left. Raises: FleetError when that takes too long."""
    deadline_s = time.monotonic() + _SMALL_S
    while True:
        status = _status("127.0.0.1", port)
        if len(status["directory"]["replicas"]) <= 1:
            return
        if time.monotonic() > deadline_s:
            raise FleetError(f"after {_SMALL_S:.0f} s still {surge.line(status)}; see `kervan status --why`")
        time.sleep(_LOOK_S)


def _status(host: str, port: int) -> dict[str, Any]:
    """What a gateway tells of the fleet. Raises: FleetError when it does not answer."""
    with _connection(host, port) as connection:
        told: dict[str, Any] = json.loads(_request(connection, "GET", "/kervan/status").read())
    return told


@contextmanager
def _running(args: Sequence[str], stdout: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """`kervan args` beside this process; ended with the block."""
    command = [sys.executable, "-m", "kervan", *args]
    with subprocess.Popen(command, stdout=stdout, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()


def _replica_loss(question: str) -> None:
    name = f"demo-{os.getpid()}"  # never a fleet that somebody else has started
    say = _clock()
    with _sigterm_unwinds():
        say(f"model: {make_demo_model(_MODEL_DIRECTORY)}")
        port = free_port()
        try:
            say("fleet: Ray and two vLLM replicas; ready when each has produced a token")
            _kervan(
                *("up", str(_MODEL_DIRECTORY), "--replicas", "2", "--detach", "--port", str(port), "--name", name),
                *("--engine-arg", "dtype=float32", "--engine-arg", "enforce_eager=true"),
                *("--engine-arg", "max_model_len=2048", "--env", "VLLM_CPU_KVCACHE_SPACE=1"),
            )
            pids = {replica["id"]: replica["pid"] for replica in _json_of("status", "--name", name)["replicas"]}
            say(f"chat: POST http://127.0.0.1:{port}/v1/chat/completions\n\n> {question}\n")
            # What it did not learn is asked twice: first undisturbed.
            expected = known_answers().get(question) or "".join(_stream_chat("127.0.0.1", port, question))
            started = time.monotonic()
            response, first_s, last_s, pauses_s = "", 0.0, 0.0, [0.0]
            serving, is_killed = "", False
            for piece in _stream_chat("127.0.0.1", port, question):
                now_s = time.monotonic() - started
                # Asked at the first piece already: some hundred tokens may be over before a later question is answered.
                serving = serving or _serving_replica("127.0.0.1", port)
                first_s = first_s or now_s
                pauses_s.append(now_s - (last_s or now_s))
                last_s = now_s
                response += piece
                click.echo(piece, nl=False)
                if not is_killed and len(response) > len(expected) // 3:
                    _kill(serving, pids)
                    is_killed = True
                    click.echo(f"\n\n    kill -9 {pids[serving]}    ({serving}, which is answering)\n")
            click.echo("\n")
            if response != expected:
                raise FleetError(
                    f"the answer has {len(response)} characters and is not the {len(expected)} that were expected; "
                    f"delete {_MODEL_DIRECTORY} and run the demo again"
                )
            say(
                f"output matches the expected text; first token after {1e3 * first_s:.0f} ms, last after "
                f"{last_s:.2f} s, longest pause {1e3 * max(pauses_s):.0f} ms"
            )
            _kervan("status", "--name", name)
        finally:
            say("stopping the fleet")
            _kervan("down", "--name", name, must=sys.exc_info()[0] is None)
        say("stopped")


def _clock() -> Callable[[str], None]:
    started = time.monotonic()
    return lambda text: click.echo(f"[{time.monotonic() - started:6.1f} s] {text}")


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does: through its `finally`."""

    def leave(number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _kervan(*args: str, must: bool = True) -> None:
    """Run `kervan args`, its output passed through.

    It has its own session: Ctrl-C reaches it once, as SIGTERM, and we wait while it cleans up. subprocess.run would
    kill it after 0.25 s.

    Raises:
        FleetError: it failed, and `must`.
    """
    command = [sys.executable, "-m", "kervan", *args]
    env = {
        key: value for key, value in os.environ.items() if key not in ("KERVAN_API_KEY", "KERVAN_API_KEYS")
    }  # this fleet is open
    quiet = None if must else subprocess.DEVNULL
    with subprocess.Popen(command, env=env, start_new_session=True, stdout=quiet, stderr=quiet) as process:
        try:
            code = process.wait()
        except BaseException:
            process.terminate()  # SIGINT may be ignored: a shell does so for its background jobs
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
    if code != 0 and must:
        raise _failed(args, code)


def _failed(args: Sequence[str], code: int) -> FleetError:
    return FleetError(f"`{shlex.join(['kervan', *args])}` exited with {code}; its message is above")


def _json_of(*args: str) -> Any:
    """The JSON that `kervan args --json` prints.

    Raises:
        FleetError: it failed.
    """
    args = (*args, "--json")
    command = [sys.executable, "-m", "kervan", *args]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False, start_new_session=True)
    if done.returncode != 0:
        raise _failed(args, done.returncode)
    return json.loads(done.stdout)


def _serving_replica(host: str, port: int) -> str:
    """The replica that has the one stream, as the gateway sees it.

    Raises:
        FleetError: the gateway does not answer, or sees no such replica.
    """
    with _connection(host, port) as connection:
        streams = json.loads(_request(connection, "GET", "/kervan/status").read())["replicas"]
    if not any(streams.values()):
        raise FleetError(
            f"no replica has the stream ({', '.join(streams) or 'there is none'}): it ended, or its replica died by "
            "itself; run the demo again"
        )
    return str(max(streams, key=streams.__getitem__))


def _kill(replica_id: str, pids: Mapping[str, int]) -> None:
    """As `kill -9` does.

    Raises:
        FleetError: the replica was not there at the start, or is gone.
    """
    if replica_id not in pids:
        raise FleetError(
            f"replica {replica_id} is answering, and the initial replicas ({', '.join(pids)}) are gone; "
            "run the demo again"
        )
    try:
        os.kill(pids[replica_id], signal.SIGKILL)
    except OSError as error:
        raise FleetError(
            f"replica {replica_id}, process {pids[replica_id]}, cannot be killed: {error.strerror}; run the demo again"
        ) from error


@contextmanager
def _connection(host: str, port: int) -> Iterator[HTTPConnection]:
    """Raises: FleetError: what fails within the block."""
    connection = HTTPConnection(host, port, timeout=_REPLY_S)
    try:
        yield connection
    except (OSError, HTTPException, json.JSONDecodeError) as error:
        raise FleetError(f"http://{host}:{port} does not answer: {error}; see `kervan status`") from error
    finally:
        connection.close()


def _stream_chat(host: str, port: int, question: str) -> Iterator[str]:
    """Pieces of the answer, as they come.

    Raises:
        FleetError: no such server, a status other than 200, or a stream with an error or without its end.
    """
    with _connection(host, port) as connection:
        model = json.loads(_request(connection, "GET", "/v1/models").read())["data"][0]["id"]
        body = {
            "model": model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": 300,
            "stream": True,
        }
        for line in _request(connection, "POST", "/v1/chat/completions", body):
            event = line.decode().strip().removeprefix("data: ")
            if event == "[DONE]":
                return
            if event:
                chunk = json.loads(event)
                if "error" in chunk:
                    raise FleetError(f"the stream ended with an error: {chunk['error']}; see `kervan status`")
                yield chunk["choices"][0]["delta"].get("content") or ""
    raise FleetError(f"the stream of http://{host}:{port} ended without [DONE]; see `kervan status`")


def _request(connection: HTTPConnection, method: str, path: str, body: Any = None) -> Any:
    """The response, once its status is 200."""
    payload = None if body is None else json.dumps(body)
    connection.request(method, path, payload, {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise FleetError(f"{method} {path} answered {response.status}: {response.read(500).decode(errors='replace')}")
    return response
