"""A fleet of twins: real Ray, real gateways, simulated engines; every token of every stream is checked."""

import asyncio
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from harness.live import START_S, Fleet, eventually, eventually_async, is_alive, stopped
from harness.shared_fleet import REPOSITORY, Models
from harness.twin_load import kervan, kill_actor, knocks, load

from kervan.config.fleet import FleetConfig
from kervan.fleet.process import TWIN_ENGINE
from kervan.twin.settings import settings
from kervan.twin.token_engine import answer

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(1800)]


def test_a_fleet_of_twins_is_shown_as_it_is(twins: Fleet) -> None:
    status = twins.status()
    assert (status["engine"], [r["state"] for r in status["replicas"]]) == ("twin", ["ready"] * 3)
    why = twins.home.kervan("status", "--why", "--name", "twins")
    assert why.stdout.splitlines()[-1] == "no problems found"
    screen = twins.home.kervan("top", "--once", "--name", "twins").stdout
    assert all(replica["id"] in screen for replica in status["replicas"])
    found = json.loads(twins.home.kervan("top", "--json", "--name", "twins").stdout)
    assert {"tokens_per_s", "ttft_s"} <= set(found["replicas"][0])


def test_a_prompt_that_came_before_is_in_the_prefix_cache(twins: Fleet) -> None:
    """Four times 200 tokens on three replicas: at least once 12 blocks of 16 are found, and the counters say so."""

    def counted(name: str) -> float:
        return twins.total(f"vllm:prefix_cache_{name}_total")

    def looked_for(tokens: int) -> None:
        eventually(lambda: counted("queries") - before[0] == tokens, f"{tokens} tokens looked for", 20)

    prompt = [20 + number % 50 for number in range(200)]
    before = counted("queries"), counted("hits")
    with twins.client() as client:
        for _ in range(4):
            body = {"model": "twin", "prompt": prompt, "max_tokens": 2}
            assert client.post("/v1/completions", json=body).status_code == 200
        looked_for(800)
        hits = counted("hits") - before[1]
        assert hits in (192, 2 * 192, 3 * 192)
        body |= {"cache_salt": "another tenant"}
        assert client.post("/v1/completions", json=body).status_code == 200
    looked_for(1000)
    assert counted("hits") - before[1] == hits


@pytest.mark.parametrize(
    "more", [{"logprobs": 1}, {"structured_outputs": {"json": {"type": "object"}}}], ids=lambda more: next(iter(more))
)
def test_what_twins_cannot_answer_is_refused(twins: Fleet, more: dict[str, Any]) -> None:
    with twins.client() as client:
        refused = client.post("/v1/completions", json={"model": "twin", "prompt": "Hello", "max_tokens": 5} | more)
    assert refused.status_code == 400
    assert "the replicas are simulated" in refused.json()["error"]["message"]


async def test_changes_under_load_lose_nothing(twins: Fleet, models: Models) -> None:
    """More and fewer replicas, other step times, other engine arguments (new gateways too), more and fewer gateways."""
    async with load(twins, models) as running:
        changed = await kervan(twins, "up", "--twin", "base_s=0.12", "--json")
        assert len(json.loads(changed)["replicas"]) == 3
        await kervan(twins, "scale", "2")
        before = running.num_whole
        await kervan(twins, "up", "--engine-arg", "max_num_seqs=64")
        await kervan(twins, "scale", "3", "--gateways", "2")
        await kervan(twins, "scale", "--gateways", "1")
        assert running.num_whole > before
    assert twins.is_whole(3, 1)


KNOCKER = """
import os, socket, sys
host, port = sys.argv[1:]
request = f"GET /v1/models HTTP/1.1\\r\\nHost: {host}\\r\\n\\r\\n".encode() * 50
with socket.create_connection((host, int(port))) as connection:
    while os.getppid() != 1:  # until the test ends it, or is gone
        connection.sendall(request)
        answered = 0
        while answered < 50:
            answered += connection.recv(1 << 16).count(b"HTTP/1.1 200")
"""


@contextlib.contextmanager
def knocking(port: int) -> Iterator[None]:
    """A gateway is asked as fast as it can answer."""
    with subprocess.Popen([sys.executable, "-c", KNOCKER, "127.0.0.1", str(port)]) as knocker:
        try:
            yield
        finally:
            knocker.kill()


async def test_gateways_follow_their_load(twins: Fleet, models: Models) -> None:
    """A gateway that has much to do gets a second one; a fixed number holds again when given."""
    await asyncio.to_thread(twins.wait_until_whole, 3, 1)
    await kervan(twins, "scale", "--gateways", "1..2")
    with knocking(twins.port):
        await asyncio.to_thread(eventually, lambda: twins.is_whole(3, 2), "a second gateway is ready", START_S)
    async with load(twins, models) as running:
        await kervan(twins, "scale", "--gateways", "1")
        assert running.broken == []
    assert twins.is_whole(3, 1)


async def test_a_change_that_cannot_start_changes_nothing(twins: Fleet, models: Models) -> None:
    await asyncio.to_thread(twins.wait_until_whole, 3, 1)
    before = {replica["id"] for replica in twins.status()["replicas"]}
    for words, status, why in (
        (("up", "--twin", "speed=fast"), 2, "is not a number"),
        (("up", "--gpu", "L5"), 2, "no GPU 'L5' is known"),
        (("up", str(models.embedding)), 1, "streams cannot move to another model"),
        (("up", "--engine", "vllm"), 1, "cannot become 'vllm'"),
    ):
        refused = await asyncio.to_thread(twins.home.kervan, *words, "--name", "twins")
        assert refused.returncode == status
        assert why in refused.stderr
    assert {replica["id"] for replica in twins.status()["replicas"]} == before


async def test_streams_leave_a_hung_replica_before_it_is_ended(twins: Fleet, models: Models) -> None:
    """Its process answers, so no connection breaks; it is ended when it has made no step for 10 s."""
    await asyncio.to_thread(twins.wait_until_whole, 3, 1)
    hung = twins.status()["replicas"][0]["id"]

    def streams_there() -> int:
        counts: dict[str, int] = twins.get("/kervan/status").json()["replicas"]
        return counts.get(hung) or 0

    def moved() -> float:
        return twins.total("kervan_streams_moved_total", reason="stalled")

    async with load(twins, models):
        await asyncio.to_thread(eventually, lambda: streams_there() > 1, "it has streams", START_S)
        before = moved()
        await kervan(twins, "fault", hung, "hang")

        def have_left() -> bool:  # without streams it looks idle, and gets one to try it
            return moved() > before and streams_there() <= 1

        await asyncio.to_thread(eventually, have_left, "its streams have left", START_S, 0.1)
        # By its id, and quickly: a command takes seconds, after which it may have been ended.
        assert hung in {labels["replica"] for labels, _ in twins.metrics()["kervan_replica_running"]}
        assert twins.total("kervan_replicas", state="ready") == 3
    await kervan(twins, "fault", hung, "none")
    assert twins.total("kervan_streams_broken_total") == 0


async def test_faults_move_streams_and_heal(twins: Fleet, models: Models) -> None:
    """One twin hangs (the watchdog finds it), one crashes, one loses most of its KV pool: no stream shows it."""
    await asyncio.to_thread(twins.wait_until_whole, 3, 1)
    async with load(twins, models):
        hung, crashed, pressed = (replica["id"] for replica in twins.status()["replicas"])
        await kervan(twins, "fault", pressed, "kv-pressure", "0.9")
        await kervan(twins, "fault", hung, "hang")
        await kervan(twins, "fault", crashed, "crash", "50")

        def ids() -> set[str]:
            return {replica["id"] for replica in twins.status()["replicas"]}

        await asyncio.to_thread(eventually, lambda: not {hung, crashed} & ids(), "the sick ones are replaced", START_S)
        await asyncio.to_thread(twins.wait_until_whole, 3, 1)
        why = await kervan(twins, "status", "--why")
        assert f"replica {pressed}: injected fault: kv-pressure 0.9" in why
        await kervan(twins, "fault", pressed, "none")
    assert twins.total("kervan_streams_broken_total") == 0


@pytest.mark.sweep(1)
@pytest.mark.parametrize(
    ("kinds", "words"),
    [
        ({"kill": 3, "drain": 1}, ("--kill-every", "6s", "--drain-every", "10s", "--for", "20s")),
        ({"hang": 1}, ("--hang-every", "3s", "--for", "5s")),
    ],
    ids=["kill and drain", "hang"],
)
def test_chaos_breaks_nothing(twins: Fleet, kinds: dict[str, int], words: tuple[str, ...]) -> None:
    twins.wait_until_whole(3, 1)
    done = twins.home.kervan("chaos", twins.url, *words, "--streams", "16", "--osl", "10..100", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert [found[key] for key in ("broken", "tokens_lost", "tokens_doubled", "tokens_wrong")] == [0, 0, 0, 0]
    assert found["streams"] >= 16
    # How fast new twins come decides how many disruptions would have left too few.
    assert {kind: row["disruptions"] + row["skipped"] for kind, row in found["kinds"].items()} == kinds
    assert all(row["disruptions"] for row in found["kinds"].values())
    assert found["moves"] > 0
    assert 0 < found["gap_s"]["p50"] <= found["gap_s"]["p99"] <= found["gap_s"]["max"]
    assert 0 < found["recover_s"]["p50"] <= found["recover_s"]["max"]
    assert found["unrecovered"] == 0
    twins.wait_until_whole(3, 1)  # the directory lists what is gone for some seconds more


def test_chaos_is_refused_where_it_cannot_be(twins: Fleet) -> None:
    for words, status, why in (
        (("--min-ready", "3"), 2, "the fleet has 3 replicas, and --min-ready 3 wants 3 besides the one that goes"),
        (("--osl", "4000"), 2, "make up to 4064 tokens, and the model's limit is 2048"),
        (("--name", "nobody"), 1, "no fleet 'nobody'"),
    ):
        refused = twins.home.kervan("chaos", twins.url, "--kill-every", "1s", *words)
        assert refused.returncode == status
        assert why in refused.stderr
        assert "Traceback" not in refused.stderr


CALLER = """
import asyncio, json, sys
from kervan.serve import cluster
cluster.connect(cluster.find_local_ray().address)
import ray

@ray.remote(num_cpus=0)
class Caller:
    async def call(self, prompt, model):
        import kervan
        fleet = kervan.get_fleet("twins")
        whole = await fleet.generate(prompt, model="twin", max_tokens=30, ignore_eos=True)
        pieces = [p async for p in fleet.generate(prompt, model="twin", max_tokens=30, ignore_eos=True)]
        chat = await fleet.chat([{"role": "user", "content": "Hi"}], model="twin", max_tokens=5)
        try:
            await fleet.generate(prompt, model="twin", max_tokens=0)
            refused = ""
        except kervan.errors.ConfigError as error:
            refused = str(error)
        async for _ in fleet.generate(prompt, model="twin", max_tokens=2000, ignore_eos=True):
            break
        await fleet.close()
        return whole.text, whole.completion_tokens, "".join(p.text for p in pieces), chat.completion_tokens, refused

print(json.dumps(ray.get(Caller.remote().call.remote(json.loads(sys.argv[1]), "twin"))))
"""


def test_other_code_on_the_cluster_calls_it_without_http(twins: Fleet, models: Models) -> None:
    prompt = [5, 6, 7, 8]
    done = subprocess.run(
        [sys.executable, "-c", CALLER, json.dumps(prompt)],
        env=twins.home.environment, cwd=twins.home.scratch, capture_output=True, text=True, timeout=START_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text, num_tokens, streamed, chatted, refused = json.loads(done.stdout.splitlines()[-1])
    with twins.client() as client:
        body = {"model": "twin", "prompt": prompt, "max_tokens": 30, "ignore_eos": True}
        over_http = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    assert (text, streamed, num_tokens, chatted) == (over_http, over_http, 30, 5)
    assert "max_tokens" in refused
    eventually(twins.is_idle, "the stream that was left is aborted", 30)


async def test_the_serve_controller_dies_and_then_the_directory(twins: Fleet, models: Models) -> None:
    """Ray restarts both, which carry no tokens. The controller finds its replicas and gateways again and stops none, and
    looks after them as before; the directory knows the latest settings again."""
    await asyncio.to_thread(twins.wait_until_whole, 3, 1)
    gateways = twins.gateway_pids()
    crashed = twins.status()["replicas"][0]["id"]
    async with load(twins, models), knocks(twins):
        await asyncio.to_thread(kill_actor, twins, "SERVE_CONTROLLER_ACTOR", "serve")
        await kervan(twins, "fault", crashed, "crash", "20")

        def is_gone() -> bool:
            return crashed not in {replica["id"] for replica in twins.status()["replicas"]}

        await asyncio.to_thread(eventually, is_gone, "the crashed twin is gone", START_S)
        await asyncio.to_thread(twins.wait_until_whole, 3, 1)
        await kervan(twins, "scale", "2")
        assert twins.gateway_pids() == gateways
        await asyncio.to_thread(kill_actor, twins, "directory-twins", "kervan")
        await asyncio.to_thread(twins.wait_until_whole, 2, 1, asks_directory=True)
        assert twins.status()["target_replicas"] == 2
        assert twins.gateway_pids() == gateways
    await kervan(twins, "scale", "3")


@dataclass
class Reader:
    """A client of one stream, which may come back. `chat`: its text counts, not its tokens."""

    prompt: list[int]
    num_tokens: int
    is_chat: bool = False
    stream_id: str = ""
    last_event_id: str = ""
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: str | None = None
    is_whole: bool = False
    names: set[str] = field(default_factory=set)

    def has(self, num_tokens: int) -> bool:
        return int(self.last_event_id.partition(".")[0] or 0) >= num_tokens

    async def ask(self, url: str, *, leave_after: int | None = None) -> None:
        body: dict[str, Any] = {"model": "twin", "max_tokens": self.num_tokens, "ignore_eos": True, "stream": True}
        if self.is_chat:
            path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": str(self.prompt)}]
        else:
            path, body["prompt"], body["return_token_ids"] = "/v1/completions", self.prompt, True
        await self._read("POST", url + path, leave_after, json=body)

    async def come_back(self, url: str, *, leave_after: int | None = None) -> None:
        headers = {"Last-Event-ID": self.last_event_id} if self.last_event_id else {}
        await self._read("GET", f"{url}/v1/streams/{self.stream_id}", leave_after, headers=headers)

    async def _read(self, method: str, url: str, leave_after: int | None, **more: Any) -> None:
        async with (
            httpx.AsyncClient(timeout=START_S, verify=False) as client,
            client.stream(method, url, **more) as response,
        ):
            assert response.status_code == 200, await response.aread()
            assert not self.stream_id or self.stream_id == response.headers["x-kervan-stream-id"]
            self.stream_id = response.headers["x-kervan-stream-id"]
            rest = b""
            async for part in response.aiter_bytes():
                *events, rest = (rest + part).split(b"\n\n")
                for event in events:
                    self._take(event)
                    if leave_after is not None and len(self.tokens) >= leave_after:
                        return

    def _take(self, event: bytes) -> None:
        name, _, data = event.partition(b"\n")
        self.last_event_id = name.removeprefix(b"id: ").decode()
        data = data.removeprefix(b"data: ")
        if data == b"[DONE]":
            self.is_whole = True
            return
        told = json.loads(data)
        self.names.add(told["id"])
        for choice in told["choices"]:
            self.tokens += choice.get("token_ids") or []
            self.text += (choice["delta"].get("content") or "") if self.is_chat else choice["text"]
            self.finish = choice["finish_reason"] or self.finish


async def test_a_killed_gateways_clients_come_back(twins: Fleet, models: Models) -> None:
    """Their streams go on at the other gateway: not a token is missing, doubled or changed."""
    await kervan(twins, "scale", "--gateways", "2")
    await asyncio.to_thread(twins.wait_until_whole, 3, 2)
    limits = settings(FleetConfig(model=str(models.demo), engine="twin", gpu="H200")).limits
    whole = Reader([], 50, is_chat=True)
    # One leaves by itself, and comes back twice, to whichever gateway has the connection.
    fickle = Reader([9, 9, 9], 30)
    await asyncio.gather(whole.ask(twins.url), fickle.ask(twins.url, leave_after=10))
    await fickle.come_back(twins.url, leave_after=20)
    await fickle.come_back(twins.url)
    await fickle.come_back(twins.url)  # it has all: nothing comes again
    assert (fickle.tokens, fickle.finish, fickle.is_whole) == (answer(fickle.prompt, 30, limits), "length", True)
    for stream_id, headers, status in (
        (fickle.stream_id, {"Authorization": "Bearer other"}, 404),
        (fickle.stream_id, {"Last-Event-ID": "twelve"}, 400),
        (fickle.stream_id, {"Last-Event-ID": "900.1"}, 410),
        ("gw-nobody-0", {}, 404),
    ):
        with twins.client(headers=headers) as client:
            refused = client.get(f"/v1/streams/{stream_id}")
        assert (refused.status_code, "message" in refused.json()["error"]) == (status, True)

    gateways = twins.gateway_pids()
    readers = [Reader([5 + seed, 6, 7], 60) for seed in range(8)]
    readers += [Reader([], 50, is_chat=True) for _ in range(4)]
    asking = [asyncio.create_task(reader.ask(twins.url)) for reader in readers]
    await eventually_async(lambda: all(reader.has(10) for reader in readers), "all streams run", START_S)
    killed = max(gateways, key=lambda gateway: sum(reader.stream_id.startswith(gateway) for reader in readers))
    os.kill(gateways[killed], signal.SIGKILL)
    ends = await asyncio.gather(*asking, return_exceptions=True)
    broken = [reader for reader, end in zip(readers, ends, strict=True) if end is not None]
    assert {type(end) for end in ends if end is not None} <= {httpx.ReadError, httpx.RemoteProtocolError}
    assert {reader.stream_id.rpartition("-")[0] for reader in broken} == {killed}
    assert not any(reader.is_whole for reader in broken)
    await asyncio.gather(*(reader.come_back(twins.url) for reader in broken))
    for reader in readers:
        assert (reader.finish, reader.is_whole) == ("length", True)
        if reader.is_chat:
            assert (reader.text, len(reader.names)) == (whole.text, 1)
        else:
            assert reader.tokens == answer(reader.prompt, 60, limits)
    await asyncio.to_thread(twins.wait_until_whole, 3, 2)
    await kervan(twins, "scale", "--gateways", "1")


async def test_a_leaving_gateways_clients_come_back(twins: Fleet, models: Models) -> None:
    """Streams with a client end where they are; those that a client has left are kept by the gateway that stays."""
    await kervan(twins, "scale", "--gateways", "2")
    await asyncio.to_thread(twins.wait_until_whole, 3, 2)
    limits = settings(FleetConfig(model=str(models.demo), engine="twin", gpu="H200")).limits
    staying = [Reader([5 + seed, 8], 120) for seed in range(6)]
    asking = [asyncio.create_task(reader.ask(twins.url)) for reader in staying]
    leaving: list[Reader] = []
    while len({reader.stream_id.rpartition("-")[0] for reader in leaving}) < 2:  # both gateways have some
        more = [Reader([5 + len(leaving) + seed, 9], 120) for seed in range(6)]
        await asyncio.gather(*(reader.ask(twins.url, leave_after=10) for reader in more))
        leaving += more
    gateways = {reader.stream_id.rpartition("-")[0] for reader in leaving}
    await kervan(twins, "scale", "--gateways", "1")
    assert len(gateways - set(twins.gateway_pids())) == 1
    await asyncio.gather(*asking, *(reader.come_back(twins.url) for reader in leaving))
    for reader in (*staying, *leaving):
        assert (reader.finish, reader.is_whole) == ("length", True)
        assert reader.tokens == answer(reader.prompt, 120, limits)


def test_a_gateway_says_where_its_log_is(twins: Fleet) -> None:
    log = Path(twins.status()["gateways"][0]["log"])
    assert log.parent == twins.home.path / "logs"
    said = log.read_text()
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]  # of shared twins, JSON
    assert any((line["logger"], line["message"][:17]) == ("kervan.fleet.link", "linked to replica") for line in lines)
    assert "max model len 2048" in said  # vLLM's words


@pytest.mark.exhaustive
def test_changes_leave_nothing_behind(twins: Fleet) -> None:
    """Six changes and back: as many processes as before, and the gateway and the directory hold no more than before.

    `benchmarks/soak.py` does 200, and has a record.
    """
    twins.wait_until_whole(3, 1)
    found = twins.home.scratch / "soak.json"
    words = ("--fleet", "twins", "--changes", "6", "--every", "6", "--clients", "2", "--json", str(found))
    done = subprocess.run(
        [sys.executable, REPOSITORY / "benchmarks" / "soak.py", *words],
        env=twins.home.environment, cwd=twins.home.scratch, capture_output=True, text=True, timeout=START_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(found.read_bytes())
    assert (result["broken"], result["streams"] > 0) == ([], True)
    before, after = result["looks"]
    ours = ("twin", "replica actor", "gateway")
    assert [after["processes"][role] for role in ours] == [before["processes"][role] for role in ours] == [3, 3, 1]
    watched = [(role, one["pid"]) for one in before["held"] if (role := one["role"]) in ("gateway", "directory")]
    assert {role for role, _ in watched} == {"gateway", "directory"}  # directories of other fleets may be there too
    for role, pid in watched:
        then, now = (next(h for h in look["held"] if (h["role"], h["pid"]) == (role, pid)) for look in (before, after))
        # One left behind by each change would be six; Ray keeps a few connections and threads as it likes.
        assert now["sockets"] <= then["sockets"] + 5
        assert now["threads"] <= then["threads"] + 5
        assert now["anon_mib"] <= then["anon_mib"] + 50


def twin_processes() -> set[int]:
    """Of this session, ready or not."""
    found = set()
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.Error):
            is_twin = TWIN_ENGINE in (process.info["cmdline"] or ())
            if is_twin and process.environ().get("KERVAN_TEST_SESSION") == os.environ["KERVAN_TEST_SESSION"]:
                found.add(process.pid)
    return found


def test_a_replica_that_still_starts_ends_with_its_fleet(twins: Fleet, models: Models) -> None:
    """Serve has started another in a killed one's place; `kervan down` does not wait until that one is ready."""
    twins.wait_until_whole(3, 1)
    arguments = ("max_model_len=2048", "served_model_name=brief")
    brief = twins.home.up(models.demo, "brief", arguments, "--engine", "twin", "--gpu", "H200", "--gateways", "1")
    before = twin_processes()
    os.kill(brief.pids()[0], signal.SIGKILL)
    (starting,) = eventually(lambda: twin_processes() - before, "another one starts", START_S, every_s=0.01)
    with stopped(starting):  # it will never be ready
        eventually(lambda: {r["state"] for r in brief.status()["replicas"]} == {"starting"}, "it is shown", START_S)
        assert brief.home.kervan("down", "--name", "brief").returncode == 0
        assert not is_alive(starting)


def test_faults_of_unknown_replicas_are_refused(twins: Fleet) -> None:
    refused = twins.home.kervan("fault", "nobody", "hang", "--name", "twins")
    assert (refused.returncode, "has no replica 'nobody'; it has" in refused.stderr) == (1, True)
    assert twins.home.kervan("fault", "nobody", "slow", "--name", "twins").returncode == 2


async def test_the_reference_has_what_commands_print_with_json(twins: Fleet) -> None:
    """Fields of lists that were empty when it was made are not in it."""
    sys.path.insert(0, str(REPOSITORY / "website"))
    try:
        collect = importlib.import_module("reference").collect
    finally:
        sys.path.pop(0)
    documented = json.loads((REPOSITORY / "website" / "fleet_commands.json").read_text())
    await asyncio.to_thread(twins.wait_until_whole, 3, 1)
    async with httpx.AsyncClient(base_url=twins.url, timeout=60) as client:
        response = await client.post("/v1/completions", json={"model": "twin", "prompt": "Hello", "max_tokens": 4})
    for command, more in (("status", ()), ("usage", ()), ("explain", (response.json()["id"],))):
        known = documented[f"kervan {command}"]["fields"]
        lists = tuple(name for name, kind in known.items() if kind == "list")
        found: dict[str, str] = {}
        collect("", json.loads(await kervan(twins, command, *more, "--json")), found)
        unknown = {name for name in found if name not in known and not name.startswith(lists)}
        assert unknown == set(), "run python website/fleet_commands.py, then website/reference.py"
