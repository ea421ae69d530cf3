"""Bare vLLM in many layouts on this host's GPUs, random weights: the points that the planner is compared with.

    python benchmarks/planner_points.py --for 560 --out DIR \\
        'llama3-8b tp=1 gpus=0 conc=1,16,64' 'qwen25-14b tp=1 gpus=1 conc=1,16,64,32@3000/200' \\
        'llama3-8b tp=2 conc=1,64' 'qwen3-30b-a3b tp=2 ep=2 conc=1,16,64'

A line is a server: NAME of models/NAME/config.json or a model directory, then tp, pp, ep, dp (1 each; dp: vLLM's data
parallelism within one server), gpus (the first tp x pp x dp), conc (concurrency, or CONC@ISL/OSL), isl (1024) and osl
(256). Lines whose GPUs do not overlap run side by side, in the order given; --points FILE has one a line. Rows go to
DIR/serving.jsonl and DIR/memory.jsonl as they come, and a record beside them is written anew after each, so a run that
is cut short keeps what it has.
"""

import argparse
import dataclasses
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import servers

from kervan.bench import records
from kervan.calibrate.measurements import Memory, Serving
from kervan.calibrate.serving import POINT_S, Point, Server, ServingRuns, phases
from kervan.calibrate.shapes import write_model
from kervan.errors import ConfigError

HERE = Path(__file__).resolve().parent
KEYS = ("tp", "pp", "ep", "dp", "gpus", "conc", "isl", "osl")


def parse_line(line: str, directory: Path) -> Server:
    """A server; its model is in `directory`. Raises: ConfigError."""
    name, *words = shlex.split(line, comments=True)
    found = dict(word.partition("=")[::2] for word in words)
    unknown = sorted(found.keys() - set(KEYS))
    if unknown or len(found) != len(words):
        raise ConfigError(f"{line!r}: {', '.join(unknown) or 'a key is given twice'}; the keys are {', '.join(KEYS)}")
    try:
        tp, pp, ep, dp = (int(found.get(key, 1)) for key in ("tp", "pp", "ep", "dp"))
        gpus = tuple(int(n) for n in found["gpus"].split(",")) if "gpus" in found else tuple(range(tp * pp * dp))
        lengths = int(found.get("isl", 1024)), int(found.get("osl", 256))
        points = tuple(_point(text, lengths) for text in found.get("conc", "1,16,64").split(","))
    except ValueError as error:
        raise ConfigError(f"{line!r}: {error}; write for example llama3-8b tp=2 gpus=0,1 conc=1,64@3000/200") from error
    return Server(Path(name).name, directory, tp, pp, ep, gpus, points, dp)


def _point(text: str, lengths: tuple[int, int]) -> Point:
    concurrency, at, own = text.partition("@")
    isl, osl = (int(n) for n in own.split("/")) if at else lengths
    return Point(int(concurrency), isl, osl)


def model_directory(name: str, place: Path) -> Path:
    """`name` itself where it is a model with a tokenizer; else made from its config, once."""
    given = Path(name)
    if (given / "tokenizer.json").is_file():
        return given.resolve()
    config = (given if given.is_dir() else HERE / "models" / name) / "config.json"
    if not config.is_file():
        raise ConfigError(f"{name!r} is neither a directory with a config.json nor in {HERE.name}/models")
    made = place / given.name
    return made if made.is_dir() else write_model(json.loads(config.read_text()), made)


class Kept:
    """The rows, in files from the moment they are measured."""

    def __init__(self, out: Path, lines: Sequence[str], settings: dict[str, Any]) -> None:
        self._out = out
        self._begin_s = time.monotonic()
        out.mkdir(parents=True, exist_ok=True)
        self._rows: dict[str, list[dict[str, Any]]] = {"serving": [], "memory": []}
        self._notes: list[str] = []
        content = {"settings": settings, "servers": list(lines), **self._rows, "notes": self._notes}
        self._record = records.record("planner-points", content)
        self._record["command"] = shlex.join(["python", "benchmarks/planner_points.py", *sys.argv[1:]])
        self._path = records.write(out, self._record)

    def row(self, row: Serving | Memory) -> None:
        kind = "serving" if isinstance(row, Serving) else "memory"
        values = dataclasses.asdict(row)
        self._rows[kind].append(values)
        with (self._out / f"{kind}.jsonl").open("a") as file:
            file.write(json.dumps(values) + "\n")
        print(json.dumps(values), flush=True)
        self._write()

    def note(self, text: str) -> None:
        self._notes.append(text)
        self.say(f"NOTE {text}")
        self._write()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._begin_s:5.1f} s] {text}", file=sys.stderr, flush=True)

    def _write(self) -> None:
        self._record["seconds"] = round(time.monotonic() - self._begin_s, 1)
        self._path = records.write(self._path, self._record)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", nargs="*", metavar="LINE", help="a server, as above")
    parser.add_argument("--points", type=Path, metavar="FILE", help="more lines; # begins a comment")
    parser.add_argument("--for", dest="for_s", type=float, default=560.0, metavar="SECONDS", help="in all")
    parser.add_argument("--point-s", type=float, default=POINT_S, help="of one load, before what is in flight ends")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--log-dir", type=Path, help="[default: OUT/logs]")
    parser.add_argument("--engine-arg", action="append", default=[], metavar="K=V", help="for every server, repeatable")
    parser.add_argument("--env", action="append", default=[], metavar="K=V", help="likewise")
    parser.add_argument("--dry-run", action="store_true", help="print which servers run side by side, and end")
    args = parser.parse_args()
    lines = [*args.lines, *(args.points.read_text().splitlines() if args.points else [])]
    lines = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    begin_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="shapes-") as place:
        try:
            found = [parse_line(line, model_directory(shlex.split(line)[0], Path(place))) for line in lines]
        except ConfigError as error:
            parser.error(str(error))
        if args.dry_run or not found:
            for number, phase in enumerate(phases(found), 1):
                for server in phase:
                    print(f"phase {number}: {server} on {server.gpus}: {'; '.join(map(str, server.points))}")
            return
        settings = {"engine_args": args.engine_arg, "env": args.env, "for_s": args.for_s, "point_s": args.point_s}
        kept = Kept(args.out, lines, settings)
        runs = ServingRuns(
            log_dir=args.log_dir or args.out / "logs",
            for_s=args.for_s - (time.monotonic() - begin_s),
            on_row=kept.row,
            on_note=kept.note,
            engine_args=servers.parse_engine_args(args.engine_arg),
            env=servers.parse_assignments(args.env),
            point_s=args.point_s,
            say=kept.say,
        )
        runs.measure(found)
        kept.say("done")


if __name__ == "__main__":
    main()
