"""Chats on a fleet: how much of their prompts comes from the replicas' prefix caches, for each way of routing.

    python benchmarks/prefix_chats.py --engine twin --record DIR                     # no GPU here
    python benchmarks/prefix_chats.py --replicas 2 --record DIR                      # a GPU for each replica
    python benchmarks/prefix_chats.py --routing prefix,least-load --rounds 3 --record DIR

--chats conversations go on at once, each for --turns turns of --isl new tokens and --osl answered ones; a prompt is
the token ids of all that was said before it and the new ones, so the cache could give all but those. Then --distinct
prompts that have nothing in common run at once: what routing by prefixes must not cost. 8B shape, random weights.

For each way of routing: prompt tokens that could have come from a cache and that did, TTFT p50 of the turns after the
first, and output tokens/s of the distinct prompts; of several rounds, medians [min, max].
"""

import argparse
import asyncio
import dataclasses
import json
import random
import re
import shlex
import statistics
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import httpx
from meters import spread
from planner_points import model_directory
from servers import Server, kervan_fleet, parse_engine_args

from kervan.bench import benchmark, records
from kervan.bench.arrivals import parse_stages
from kervan.bench.endpoint import get_text
from kervan.bench.load import Endpoint, Load
from kervan.bench.prefix_reuse import whole_blocks
from kervan.bench.reconcile import Counters, read_counters
from kervan.config.fleet import SETTINGS
from kervan.vendor.vllm_names import COMPLETIONS_PATH

FIRST_ID, NUM_IDS = 10, 3000  # of prompts: in every vocabulary, and no special tokens
DEFAULT_ARGS = ("load_format=dummy", "max_model_len=8192")
START_TIMEOUT_S = 480.0
REQUEST_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Turn:
    """One request of a chat. `possible_tokens`: of its prompt, those that its chat had before, in whole blocks."""

    turn: int
    prompt_tokens: int
    possible_tokens: int
    cached_tokens: int
    ttft_s: float


@dataclass(frozen=True)
class ChatShape:
    """`think_s`: between an answer and the next turn, on average, exponentially distributed."""

    chats: int
    turns: int
    isl: int
    osl: int
    think_s: float


async def ask(client: httpx.AsyncClient, model: str, prompt: list[int], osl: int) -> tuple[list[int], int, float]:
    """(the answer's token ids, prompt tokens from the cache, TTFT in seconds).

    Raises: httpx.HTTPError, ValueError for an answer that is not whole.
    """
    body = {
        "model": model, "prompt": prompt, "max_tokens": osl, "ignore_eos": True, "stream": True,
        "return_token_ids": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    answer: list[int] = []
    cached, ttft_s, begin_s = 0, 0.0, time.monotonic()
    async with client.stream("POST", COMPLETIONS_PATH, json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise ValueError(f"an answer ended with {chunk['error']}")
            for choice in chunk["choices"]:
                answer += choice.get("token_ids") or ()
                ttft_s = ttft_s or (time.monotonic() - begin_s if answer else 0.0)
            usage = chunk.get("usage") or {}
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or cached
    if len(answer) != osl:
        raise ValueError(f"an answer has {len(answer)} tokens, {osl} were asked for")
    return answer, cached, ttft_s


async def chat(client: httpx.AsyncClient, model: str, shape: ChatShape, seed: str) -> list[Turn]:
    rng = random.Random(seed)
    said: list[int] = []
    turns = []
    for turn in range(shape.turns):
        prompt = said + [FIRST_ID + rng.randrange(NUM_IDS) for _ in range(shape.isl)]
        answer, cached, ttft_s = await ask(client, model, prompt, shape.osl)
        turns.append(Turn(turn, len(prompt), whole_blocks(len(said) - 1), cached, ttft_s))
        said = prompt + answer
        await asyncio.sleep(rng.expovariate(1 / shape.think_s) if shape.think_s else 0)
    return turns


async def all_chats(server: Server, shape: ChatShape, seed: int) -> list[Turn]:
    """All at once."""
    async with AsyncExitStack() as stack:
        # A connection each, as browsers have: they spread over the gateways.
        clients = [
            await stack.enter_async_context(httpx.AsyncClient(base_url=server.url, timeout=REQUEST_TIMEOUT_S))
            for _ in range(shape.chats)
        ]
        found = await asyncio.gather(
            *(chat(client, server.model, shape, f"{seed} {number}") for number, client in enumerate(clients))
        )
    return [turn for turns in found for turn in turns]


def chat_figures(turns: list[Turn], before: Counters, after: Counters) -> dict[str, float | None]:
    """Of one round. The engines' own counters stand beside what the answers say."""
    possible, cached = sum(t.possible_tokens for t in turns), sum(t.cached_tokens for t in turns)
    later = [t.ttft_s for t in turns if t.turn]
    counted = after.minus(before)
    return {
        "prompt_tokens": sum(t.prompt_tokens for t in turns),
        "possible_tokens": possible,
        "cached_tokens": cached,
        "of_possible": cached / possible if possible else None,
        "counted_hits": counted.prefix_hits,
        "counted_queries": counted.prefix_queries,
        "first_ttft_p50_s": statistics.median(t.ttft_s for t in turns if not t.turn),
        "later_ttft_p50_s": statistics.median(later) if later else None,
    }


def counters(server: Server) -> Counters:
    return read_counters(get_text(Endpoint(url=server.url), "/metrics")) or Counters()


def predicted_and_hit(server: Server) -> tuple[float, float]:
    """Prompt tokens that the gateways expected in the caches of the replicas, and that were there, so far."""
    page = get_text(Endpoint(url=server.url), "/metrics")
    predicted, hit = (
        sum(map(float, re.findall(rf"^kervan_prefix_{name}_tokens_total\S* (\S+)$", page, re.M)))
        for name in ("predicted", "hit")
    )
    return predicted, hit


def distinct_tok_s(server: Server, shape: ChatShape, count: int, seed: int) -> float:
    """Output tokens/s of `count` prompts at once that have nothing in common.

    Raises: RuntimeError when one fails.
    """
    load = Load(stages=parse_stages(f"burst:{count}"), isl=str(shape.isl), osl=str(shape.osl), seed=seed)
    prepared = benchmark.prepare(Endpoint(url=server.url, model=server.model), load)
    client = benchmark.ClientOptions(processes=1, calibrates=False, reconciles=False)
    result = benchmark.measure(prepared, load, client=client)
    if result.tally.num_errors:
        raise RuntimeError(f"{result.tally.num_errors} of {count} distinct prompts failed: {result.tally.messages}")
    return result.out_tok_s


def known_routings() -> list[str]:
    """The values of the fleet's setting `routing`, where this version has one."""
    return list(get_args(SETTINGS["routing"].type)) if "routing" in SETTINGS else ["least-load"]


def measure(args: argparse.Namespace, model: str, routing: str, place: Path) -> dict[str, Any]:
    """A fleet of its own for this way of routing."""
    shape = ChatShape(args.chats, args.turns, args.isl, args.osl, args.think)
    words = ["--engine", args.engine, *(["--gpu", args.gpu] if args.engine == "twin" else []), *args.up.split()]
    if "routing" in SETTINGS:
        config = place / f"{routing}.json.yaml"
        config.write_text(json.dumps({"routing": routing}))
        words += ["--config", str(config)]
    engine_args = parse_engine_args([*DEFAULT_ARGS, *args.engine_arg]) | {"enable_prompt_tokens_details": True}
    fleet = kervan_fleet(
        model, engine_args, log_dir=args.log_dir / routing, env={}, replicas=args.replicas, gateways=args.gateways,
        up_args=words, timeout_s=START_TIMEOUT_S,
    )  # fmt: skip
    rounds: list[dict[str, float | None]] = []
    with fleet as starting:
        server = starting.wait()
        asyncio.run(all_chats(server, dataclasses.replace(shape, turns=2), -1))  # what starts up, starts up here
        for number in range(args.rounds):
            before, expected = counters(server), predicted_and_hit(server)
            figures = chat_figures(asyncio.run(all_chats(server, shape, number)), before, counters(server))
            predicted, hit = (now - then for now, then in zip(predicted_and_hit(server), expected, strict=True))
            figures["hit_of_predicted"] = hit / predicted if predicted else None
            if args.distinct:
                figures["distinct_tok_s"] = distinct_tok_s(server, shape, args.distinct, 1000 + number)
            print(routing, number + 1, json.dumps(figures), file=sys.stderr, flush=True)
            rounds.append(figures)
    return {"routing": routing, "rounds": rounds, "figures": summary(rounds)}


def summary(rounds: list[dict[str, float | None]]) -> dict[str, dict[str, float]]:
    """Median, minimum and maximum of each figure."""
    figures = {name: [value for one in rounds if (value := one[name]) is not None] for name in rounds[0]}
    return {name: spread(values) for name, values in figures.items() if values}


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown."""
    lines = [
        "| routing | possible tokens | of these from the cache | TTFT p50, first turn | later turns | distinct tok/s |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        figures = row["figures"]

        def cell(name: str, factor: float, form: str, figures: dict[str, dict[str, float]] = figures) -> str:
            if name not in figures:
                return "-"
            median, low, high = (form.format(factor * figures[name][key]) for key in ("median", "min", "max"))
            return median if low == high else f"{median} [{low}, {high}]"

        lines.append(
            f"| {row['routing']} | {cell('possible_tokens', 1, '{:,.0f}')} | {cell('of_possible', 100, '{:.1f}%')} | "
            f"{cell('first_ttft_p50_s', 1e3, '{:.0f} ms')} | {cell('later_ttft_p50_s', 1e3, '{:.0f} ms')} | "
            f"{cell('distinct_tok_s', 1, '{:,.0f}')} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama3-8b", help="of models/, or a directory")
    parser.add_argument("--engine", choices=("vllm", "twin"), default="vllm")
    parser.add_argument("--gpu", default="H200", help="that twins simulate")
    parser.add_argument("--routing", help=f"ways, with commas [default: {','.join(known_routings())}]")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--gateways", type=int, default=1)
    parser.add_argument("--chats", type=int, default=48)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--isl", type=int, default=512)
    parser.add_argument("--osl", type=int, default=64)
    parser.add_argument("--think", type=float, default=0.0, help="seconds")
    parser.add_argument("--distinct", type=int, default=256, help="prompts; 0: leave that out")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--engine-arg", action="append", default=[], help="key=value, repeatable")
    parser.add_argument("--up", default="", help="more words for kervan up")
    parser.add_argument("--log-dir", type=Path, default=Path("prefix-chats-logs"))
    parser.add_argument("--record", type=Path, help="a file or directory")
    args = parser.parse_args()
    routings = args.routing.split(",") if args.routing else known_routings()
    if unknown := [one for one in routings if one not in known_routings()]:
        parser.error(f"--routing {unknown[0]}: this version of kervan has {', '.join(known_routings())}")
    with tempfile.TemporaryDirectory(prefix="shapes-") as place:
        model = str(model_directory(args.model, Path(place)))
        rows = [measure(args, model, routing, Path(place)) for routing in routings]
    print(table(rows))
    if args.record is not None:
        asked = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        record = records.record("prefix-chats", {"load": asked, "rows": rows})
        record["command"] = shlex.join(["python", *sys.argv])
        print(f"record: {records.write(args.record, record)}")


if __name__ == "__main__":
    main()
