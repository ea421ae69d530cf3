"""A batch job on the fleet's Ray cluster, without HTTP: python batch.py PROMPTS.jsonl ANSWERS.jsonl [FLEET] [ADDRESS].

A line of the prompts is {"prompt": "...", "max_tokens": 64}, with any field of /v1/completions; lines of the answers
come in the same order. `--address` of `kervan up` is ADDRESS; without it, the Ray that kervan started here is meant.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import kervan
from kervan.serve.attach import attach

AT_ONCE = 64  # more than the replicas run at once only waits at the gateway


async def run(prompts: list[dict[str, Any]], fleet_name: str) -> list[dict[str, Any]]:
    fleet = kervan.get_fleet(fleet_name)
    slots = asyncio.Semaphore(AT_ONCE)

    async def answer(fields: dict[str, Any]) -> dict[str, Any]:
        async with slots:
            done = await fleet.generate(**fields)
        return {"text": done.text, "finish_reason": done.finish_reason, "tokens": done.completion_tokens}

    try:
        return list(await asyncio.gather(*map(answer, prompts)))
    finally:
        await fleet.close()


def main() -> None:
    if not 3 <= len(sys.argv) <= 5:
        sys.exit("usage: python batch.py PROMPTS.jsonl ANSWERS.jsonl [FLEET] [ADDRESS]")
    source, target, *more = sys.argv[1:]
    prompts = [json.loads(line) for line in Path(source).read_text().splitlines()]
    fleet_name, address = (*more, None, None)[:2]
    attach(fleet_name or "default", address)  # joins the cluster
    answers = asyncio.run(run(prompts, fleet_name or "default"))
    Path(target).write_text("".join(f"{json.dumps(answer)}\n" for answer in answers))
    print(f"{len(answers)} answers, {sum(answer['tokens'] for answer in answers):,} tokens")


if __name__ == "__main__":
    main()
