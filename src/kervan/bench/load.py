"""What a run sends, and when: plain values, so that they go to worker processes and into records as they are."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kervan.bench.arrivals import Process, Stage, offsets_s
from kervan.config.workload import Slo, TraceRow, parse_lengths, read_trace
from kervan.errors import ConfigError
from kervan.vendor import vllm_names

Api = Literal["completions", "chat"]
PATHS: dict[Api, str] = {"completions": vllm_names.COMPLETIONS_PATH, "chat": vllm_names.CHAT_PATH}


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """An OpenAI-compatible server. `url` has no `/v1`; `sampling` goes into each request's body as it is.

    `model` empty: the one that the server has.
    """

    url: str
    model: str = ""
    api: Api = "completions"
    headers: tuple[tuple[str, str], ...] = ()
    sampling: dict[str, Any] = dataclasses.field(default_factory=dict)
    verify_tls: bool = True


@dataclass(frozen=True, kw_only=True)
class Load:
    """Arrivals and prompts of a run.

    Closed loop: `streams` is set; each stream starts its next job when its last one has ended. Open loop: `stages` or
    `trace` say when jobs arrive. A job is a conversation of `turns` requests, nearly always one; with `calls`, from the
    second turn on so many at once, which differ in their last message. The run ends after `num_requests`, or when
    `duration_s` is over and what is in flight has ended.
    """

    streams: int | None = None
    stages: tuple[Stage, ...] = ()
    process: Process = "poisson"
    burstiness: float = 1.0
    trace: str | None = None
    trace_speed: float = 1.0
    num_requests: int | None = None
    duration_s: float | None = None
    isl: str = "64"
    osl: str = "64"
    prefixes: int = 0
    prefix_tokens: int = 0
    turns: int = 1
    calls: int = 1
    think_time_s: float = 0.0
    prompts: str | None = None
    ignore_eos: bool = True
    tokens_in_chunks: bool = False
    seed: int = 0
    timeout_s: float = 600.0
    max_streams: int = 10_000
    stall_s: float = 1.0

    def __post_init__(self) -> None:
        """Raises: ConfigError."""
        ways = (self.streams is not None) + bool(self.stages) + (self.trace is not None)
        if ways != 1:
            raise ConfigError(f"{ways} kinds of arrivals: give one of --streams, --rate, --burst, --stages and --trace")
        if self.streams is not None and not 1 <= self.streams <= self.max_streams:
            raise ConfigError(f"--streams {self.streams} is outside 1..{self.max_streams} (--max-streams)")
        if self.streams is not None and (at_once := self.streams * self.calls) > self.max_streams:
            raise ConfigError(
                f"--streams {self.streams} with --calls {self.calls} are {at_once} requests at once, over "
                f"--max-streams {self.max_streams}; use --max-streams {at_once}"
            )
        positive = (
            ("--num-requests", self.num_requests), ("--duration", self.duration_s), ("--turns", self.turns),
            ("--calls", self.calls),
            ("--timeout", self.timeout_s), ("--max-streams", self.max_streams), ("--trace-speed", self.trace_speed),
            ("--burstiness", self.burstiness), ("--stall", self.stall_s),
        )  # fmt: skip
        for name, value in positive:
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} {value:g} is not above 0")
        if self.think_time_s < 0 or self.prefixes < 0 or self.prefix_tokens < 0:
            raise ConfigError("--think-time and --prefix cannot be negative")
        if self.calls > 1 and self.turns == 1:
            raise ConfigError(
                f"--calls {self.calls} with --turns 1: calls at once begin with the second turn; add --turns"
            )
        if (self.prefixes > 0) != (self.prefix_tokens > 0):
            raise ConfigError("--prefix needs a number and a length, like 4x512: 4 prefixes of 512 tokens")
        if self.num_requests is None and self.duration_s is None and self.trace is None and not self.is_finite:
            raise ConfigError("the load has no end: give --num-requests or --duration")
        parse_lengths(self.isl, "--isl")
        parse_lengths(self.osl, "--osl")

    @property
    def is_finite(self) -> bool:
        """Whether the stages end by themselves."""
        return bool(self.stages) and all(math.isfinite(stage.expected_arrivals) for stage in self.stages)

    @property
    def num_jobs(self) -> int | None:
        """Jobs that `num_requests` allows, whole conversations; None without a bound."""
        return None if self.num_requests is None else math.ceil(self.num_requests / self.requests_per_job)

    @property
    def requests_per_job(self) -> int:
        """Of a conversation that goes to its end."""
        return 1 + (self.turns - 1) * self.calls

    def arrivals(self) -> Iterator[tuple[float, TraceRow | None]]:
        """(seconds after the start, trace row) of each job of an open loop.

        Raises: ConfigError for a broken trace.
        """
        jobs: Iterator[tuple[float, TraceRow | None]]
        if self.trace is not None:
            jobs = ((row.at_s / self.trace_speed, row) for row in read_trace(Path(self.trace)))
        else:
            times = offsets_s(self.stages, self.process, burstiness=self.burstiness, seed=self.seed)
            jobs = ((at_s, None) for at_s in times)
        if self.duration_s is not None:
            bound_s = self.duration_s
            jobs = itertools.takewhile(lambda job: job[0] < bound_s, jobs)
        return itertools.islice(jobs, self.num_jobs)

    @property
    def expected_streams(self) -> int:
        """Streams that the client must be able to carry: those of a closed loop, else an estimate for calibration."""
        if self.streams is not None:
            return self.streams * self.calls
        burst = max((stage.burst for stage in self.stages), default=0)
        rate = max((max(s.start_rate, s.end_rate) for s in self.stages if not s.burst), default=0.0)
        if self.trace is not None:
            rate = 10.0 * self.trace_speed
        # About 20 ms a token: a server that is slower holds more streams and sends as many tokens.
        in_flight = rate * (0.1 + 0.02 * parse_lengths(self.osl).mean)
        return max(1, min(self.max_streams, round(max(burst, in_flight))))

    def to_dict(self) -> dict[str, Any]:
        """Everything that differs from a default, for records; infinite durations as None."""
        differing = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "stages":
                value = [
                    {**dataclasses.asdict(s), "duration_s": s.duration_s if math.isfinite(s.duration_s) else None}
                    for s in value
                ]
            if value != field.default and value not in ((), []):
                differing[field.name] = value
        return differing


__all__ = ["PATHS", "Api", "Endpoint", "Load", "Slo"]
