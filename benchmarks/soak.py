"""Many changes of a fleet of twins under a small load; what its processes hold before and after.

    python benchmarks/soak.py --model DIR --changes 200 --record benchmarks/records
    python benchmarks/soak.py --fleet NAME --changes 8          # a fleet of twins that runs, on this machine's Ray

A change is another number of replicas (1 to 4); or, every tenth time, one gateway more and then one less; with
`--settings-every N`, every so many times another engine argument, which replaces all replicas and gateways. After every
`--every` changes the fleet is brought to the same size again, the load pauses, and it is looked at: processes by role,
and for each long-lived process its sockets, threads and anonymous memory. (How much of a library's pages is counted as
a process's own depends on who else runs on the machine.) Every token of every stream is checked.
"""

import argparse
import asyncio
import collections
import contextlib
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

from kervan.bench import records
from kervan.config.fleet import FleetConfig
from kervan.serve import changes, cluster
from kervan.serve import status as serve_status
from kervan.twin.settings import settings
from kervan.twin.token_engine import answer

MAX_REPLICAS = 4
GATEWAY_CHANGE = 10  # every so many changes
REST_S = 12.0  # after which the directory has forgotten what is gone, and leases have ended
LONGEST_REST_S = 120.0  # for processes that still leave; then they are told as left behind
# Words in a process's command line -> its role, for what a fleet has of its own with the fleet's name in it. Ray names
# its workers after their actors; other fleets may be on the same Ray.
OWN_ROLES = {
    "ServeReplica:kervan-{}:gateway": "gateway actor",
    "ServeReplica:kervan-{}:on-demand": "replica actor",
}
ROLES = {
    "ray::DirectoryActor": "directory",
    "ray::ServeController": "serve controller",
    "gcs_server": "gcs",
    "raylet/raylet": "raylet",
}
WATCHED = ("gateway", "directory", "serve controller", "gcs", "raylet")


def role(process: psutil.Process, fleet: str) -> str:
    command = " ".join(process.cmdline()).strip()
    roles = {word.format(fleet): name for word, name in OWN_ROLES.items()} | ROLES
    if "kervan.twin.replica" in command:
        parent = process.parent()
        return "twin" if parent is not None and role(parent, fleet) == "replica actor" else "other"
    if command.startswith("kervan gateway ") and command.endswith(f" of {fleet}"):
        return "gateway"
    return next((name for word, name in roles.items() if word in command), "other")


def _is_gateway(process: psutil.Process, fleet: str) -> bool:
    with contextlib.suppress(psutil.Error):
        return role(process, fleet) == "gateway"
    return False


def look(config: FleetConfig) -> dict[str, Any]:
    """Processes of the local Ray by role, and what the long-lived ones hold."""
    local = cluster.find_local_ray()
    assert local is not None
    counts: collections.Counter[str] = collections.Counter()
    held = []
    # Gateways are forked from a process of the node, which is not Ray's.
    gateways = [p for p in psutil.process_iter() if p.pid != local.pid and _is_gateway(p, config.name)]
    for process in [*psutil.Process(local.pid).children(recursive=True), *gateways]:
        try:
            name = role(process, config.name)
            counts[name] += 1
            if name in WATCHED:
                status = Path(f"/proc/{process.pid}/status").read_text()
                held.append(
                    {
                        "role": name,
                        "pid": process.pid,
                        "sockets": len(process.net_connections(kind="all")),
                        "files": process.num_fds(),
                        "threads": process.num_threads(),
                        "anon_mib": round(int(status.partition("RssAnon:")[2].split()[0]) / 1024, 1),
                    }
                )
        except (psutil.NoSuchProcess, FileNotFoundError):
            continue
    return {"replicas": config.replicas, "gateways": config.gateways, "processes": dict(counts), "held": held}


def left_behind(looked: dict[str, Any]) -> bool:
    """Whether there are other processes of the fleet than its size tells."""
    expected = {"twin": "replicas", "replica actor": "replicas", "gateway": "gateways", "gateway actor": "gateways"}
    return any(looked["processes"].get(name) != looked[number] for name, number in expected.items())


class Load(threading.Thread):
    """So many clients, each with one stream after the other, on a new connection for each."""

    def __init__(self, url: str, model: str, config: FleetConfig, num_clients: int):
        super().__init__(daemon=True)
        self.url, self.model, self.num_clients = url, model, num_clients
        self.limits = settings(config).limits
        self.num_whole = 0
        self.broken: list[str] = []
        self.is_over = self.is_paused = False

    def run(self) -> None:
        async def main() -> None:
            await asyncio.gather(*(self._client(seed) for seed in range(self.num_clients)))

        asyncio.run(main())

    async def _client(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self.is_over:
            if self.is_paused:
                await asyncio.sleep(0.1)
                continue
            prompt = [rng.randint(self.limits.first_token, self.limits.last_token) for _ in range(rng.randint(4, 60))]
            num_tokens = rng.randint(20, 200)
            try:
                async with httpx.AsyncClient(base_url=self.url, timeout=600, verify=False) as client:
                    tokens = await self._stream(client, prompt, num_tokens)
            except (httpx.HTTPError, ValueError, KeyError) as error:
                self.broken.append(repr(error))
                await asyncio.sleep(0.5)
                continue
            if tokens == answer(prompt, num_tokens, self.limits):
                self.num_whole += 1
            else:
                self.broken.append(f"{len(tokens)} of {num_tokens} tokens, or wrong ones")

    async def _stream(self, client: httpx.AsyncClient, prompt: list[int], num_tokens: int) -> list[int]:
        body = {
            "model": self.model, "prompt": prompt, "max_tokens": num_tokens, "ignore_eos": True, "stream": True,
            "return_token_ids": True,
        }  # fmt: skip
        tokens: list[int] = []
        async with client.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            rest = b""
            async for part in response.aiter_bytes():
                *lines, rest = (rest + part).split(b"\n")
                for line in lines:
                    if line.startswith(b"data: {"):
                        for choice in json.loads(line[6:])["choices"]:
                            tokens += choice.get("token_ids") or []
        return tokens


def soak(name: str, num_changes: int, every: int, num_clients: int, seed: int, settings_every: int) -> dict[str, Any]:
    """Change fleet `name` so many times and leave it as it was found."""
    before = serve_status.status(name)
    config = before.config
    with httpx.Client(base_url=before.url) as client:
        model = client.get("/v1/models").json()["data"][0]["id"]
    load = Load(before.url, model, config, num_clients)
    load.start()
    rng = random.Random(seed)
    rest = (config.replicas, config.gateways)
    replicas, gateways = rest
    looks: list[dict[str, Any]] = []
    begin_s = time.monotonic()

    def change(to_replicas: int, to_gateways: int) -> None:
        nonlocal replicas, gateways
        if (to_replicas, to_gateways) != (replicas, gateways):
            changes.scale(name, {"replicas": to_replicas, "gateways": to_gateways, "max_gateways": 0})
        replicas, gateways = to_replicas, to_gateways

    def change_settings(number: int) -> None:
        running = changes.RunningFleet(name, None, lambda _: None)
        running.apply(running.plan({"engine_args": {"max_num_seqs": 100 + number}}, "soak.py"))

    def rest_and_look(number: int) -> None:
        change(*rest)
        load.is_paused = True
        time.sleep(REST_S)
        until_s = time.monotonic() + LONGEST_REST_S - REST_S
        while (looked := look(config)) and left_behind(looked) and time.monotonic() < until_s:
            time.sleep(1.0)
        looks.append({"changes": number, **looked})
        print(
            f"{number} changes, {load.num_whole} streams, {len(load.broken)} broken: {summary(looks[-1])}", flush=True
        )
        load.is_paused = False

    try:
        rest_and_look(0)
        for number in range(1, num_changes + 1):
            if number % GATEWAY_CHANGE == 0:
                change(replicas, rest[1] + (gateways == rest[1]))
            elif settings_every and number % settings_every == 0:
                change_settings(number)
            else:
                change(rng.choice([n for n in range(1, MAX_REPLICAS + 1) if n != replicas]), gateways)
            if number % every == 0 or number == num_changes:
                rest_and_look(number)
    finally:
        load.is_over = True
        load.join(timeout=120)
    return {
        "changes": num_changes,
        "settings_every": settings_every,
        "clients": num_clients,
        "wall_s": round(time.monotonic() - begin_s, 1),
        "streams": load.num_whole,
        "broken": load.broken,
        "looks": looks,
    }


def summary(looked: dict[str, Any]) -> str:
    held = ", ".join(
        f"{h['role']} {h['sockets']} sockets {h['threads']} threads {h['anon_mib']:.0f} MiB" for h in looked["held"]
    )
    return f"{looked['processes']}; {held}"


def kervan(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "kervan", *words], stdout=subprocess.DEVNULL, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="A model directory with a tokenizer: start a fleet of twins for this.")
    parser.add_argument("--fleet", help="A fleet of twins that runs.")
    parser.add_argument("--changes", type=int, default=200)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--settings-every", type=int, default=0)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=18432)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--json", type=Path, help="Write what was found there.")
    args = parser.parse_args()
    if (args.model is None) == (args.fleet is None):
        parser.error("give either --model or --fleet")
    words = (args.changes, args.every, args.clients, args.seed, args.settings_every)
    if args.fleet is not None:
        found = soak(args.fleet, *words)
    else:
        with tempfile.TemporaryDirectory(prefix="kt-") as home:
            os.environ["KERVAN_HOME"] = home
            kervan(
                "up", args.model, "--name", "soak", "--engine", "twin", "--gpu", "H200", "--twin", "base_s=0.03",
                "--engine-arg", "max_model_len=2048", "--replicas", "2", "--gateways", "1", "--port", str(args.port),
                "--detach",
            )  # fmt: skip
            try:
                found = soak("soak", *words)
            finally:
                kervan("down", "--name", "soak")
    if args.json is not None:
        args.json.write_text(json.dumps(found))
    if args.record is not None:
        command = shlex.join(["python", "benchmarks/soak.py", *sys.argv[1:]])
        print(records.write(args.record, {**records.record("soak", found), "command": command}))


if __name__ == "__main__":
    main()
