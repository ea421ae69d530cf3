"""What was given to `kervan bench`, and the load, server and client that it means."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kervan.bench import servers
from kervan.bench.arrivals import Process, Stage, parse_stages, steady
from kervan.bench.drive import Action
from kervan.bench.load import Api, Endpoint, Load
from kervan.bench.prompts import read_prompts
from kervan.bench.saturation import RateSearchOptions
from kervan.cli.options import client_key
from kervan.config.workload import Lengths, Slo
from kervan.errors import ConfigError
from kervan.facts.markup import json_value
from kervan.units import parse_duration_s

DURATION_S = 30.0  # of a load without an end of its own


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchOptions:
    """The command's arguments by the names of click's parameters; `bench.py` says what each means, and its default.

    Each method raises ConfigError for text that cannot be read, and for options that do not go together.
    """

    url: str
    streams: list[int] | None
    rate: list[float] | None
    arrivals: Process
    burstiness: float
    burst: int | None
    stages: str | None
    trace: Path | None
    trace_speed: float
    num_requests: int | None
    duration: float | None
    isl: Lengths
    osl: Lengths
    prefix: str | None
    turns: int
    calls: int
    think_time: float
    prompts: str | None
    api: Api | None
    model: str | None
    tokenizer: str | None
    sampling: tuple[str, ...]
    stop_at_eos: bool
    per_chunk_usage: bool
    headers: tuple[str, ...]
    api_key: str | None
    insecure: bool
    given_slo: Slo | None
    stall: float
    timeout: float
    max_streams: int
    seed: int
    processes: int | None
    no_calibration: bool
    find_rate: bool
    attain: float
    trial_time: float
    against: str | None
    pairs: int
    fail_below: float | None
    actions: tuple[str, ...]
    strict: bool
    as_json: bool
    record: Path | None
    html: Path | None

    def slo(self) -> Slo:
        """The bounds that a good request keeps; without --slo, every request that is whole counts as good."""
        if self.given_slo is None and self.find_rate:
            raise ConfigError("--find-rate needs an --slo, like ttft=1s,tpot=50ms")
        return self.given_slo or Slo()

    def endpoint(self, url: str) -> Endpoint:
        """The server at `url`, with what --api, --model and other options say of its requests."""
        return Endpoint(
            url=url,
            model=self.model or "",
            api=self._api(),
            headers=(*map(_parse_header, self.headers), *self._authorization()),
            sampling=dict(map(_parse_sampling, self.sampling)),
            verify_tls=not self.insecure,
        )

    def check_servers(self) -> None:
        """Raises: ConfigError for a URL that is none, and for options that make no request."""
        servers.check(self.url)
        if self.against is not None:
            servers.check(self.against)
        self.endpoint(self.url)

    def _api(self) -> Api:
        needs_chat = self.turns > 1 or (self.prompts is not None and "messages" in read_prompts(Path(self.prompts))[0])
        api = self.api or ("chat" if needs_chat else "completions")
        if self.turns > 1 and api != "chat":
            raise ConfigError(
                f"--turns {self.turns} with --api {api}: a conversation is a list of messages, which only chat takes; "
                "leave --api out"
            )
        return api

    def _authorization(self) -> tuple[tuple[str, str], ...]:
        key = client_key(self.api_key)
        return (("Authorization", f"Bearer {key}"),) if key else ()

    def timed_actions(self) -> list[Action]:
        """The shell commands of --at."""
        return [_parse_action(text) for text in self.actions]

    def rate_search(self) -> RateSearchOptions:
        """How --find-rate searches; it begins at --rate."""
        return RateSearchOptions(
            start_rate=RateSearchOptions.start_rate if self.rate is None else self.rate[0],
            attain=self.attain,
            max_trial_s=self.trial_time,
        )

    def loads(self) -> list[Load]:
        """One load, or those of a sweep."""
        streams, rates = self.streams, self.rate
        if self.find_rate and rates is None:
            rates = [RateSearchOptions.start_rate]
        if self.trace is None and self.burst is None and self.stages is None and streams is None and rates is None:
            streams = [1]
        each_streams: list[int | None] = [None] if streams is None else [*streams]
        each_rate: list[float | None] = [None] if rates is None else [*rates]
        return [self._load(one_streams, rate) for one_streams in each_streams for rate in each_rate]

    def _load(self, streams: int | None, rate: float | None) -> Load:
        duration_s = self.duration
        if self.num_requests is None and duration_s is None and (streams is not None or rate is not None):
            duration_s = DURATION_S
        prefixes, prefix_tokens = _parse_prefix(self.prefix)
        return Load(
            streams=streams,
            stages=self._stages(rate),
            process=self.arrivals,
            burstiness=self.burstiness,
            trace=None if self.trace is None else str(self.trace),
            trace_speed=self.trace_speed,
            num_requests=self.num_requests,
            duration_s=duration_s,
            isl=self.isl.text,
            osl=self.osl.text,
            prefixes=prefixes,
            prefix_tokens=prefix_tokens,
            turns=self.turns,
            calls=self.calls,
            think_time_s=self.think_time,
            prompts=self.prompts,
            ignore_eos=not self.stop_at_eos,
            tokens_in_chunks=self.per_chunk_usage,
            seed=self.seed,
            timeout_s=self.timeout,
            max_streams=self.max_streams,
            stall_s=self.stall,
        )

    def _stages(self, rate: float | None) -> tuple[Stage, ...]:
        if (rate is not None) + (self.burst is not None) + (self.stages is not None) > 1:
            raise ConfigError("--rate, --burst and --stages exclude each other; --stages can say all three")
        if rate is not None:
            return steady(rate)
        if self.burst is not None:
            return parse_stages(f"burst:{self.burst}")
        return () if self.stages is None else parse_stages(self.stages)


def _parse_prefix(text: str | None) -> tuple[int, int]:
    if text is None:
        return 0, 0
    match = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", text.strip())
    if match is None:
        raise ConfigError(f"--prefix {text!r}: write 4x512 for 4 prefixes of 512 tokens")
    return int(match[1]), int(match[2])


def _parse_action(text: str) -> Action:
    at, _, command = text.strip().partition(" ")
    if not command.strip():
        raise ConfigError(f"--at {text!r} has no command; write --at '10s kill -9 1234'")
    return Action(parse_duration_s(at, "--at"), command.strip())


def _parse_header(text: str) -> tuple[str, str]:
    name, separator, value = text.partition(":")
    if not separator or not name.strip() or "\n" in text or "\r" in text:
        raise ConfigError(f"--header {text!r}: write 'Name: value'")
    return name.strip(), value.strip()


def _parse_sampling(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {text!r}: write --set temperature=0")
    try:
        return key, json_value(value)
    except ValueError:
        return key, value
