"""A whole run against one server: look at it, calibrate the client, load it, compare with its metrics."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kervan.bench import client_floor, reconcile
from kervan.bench.arrivals import steady
from kervan.bench.counting import WorkerProgress
from kervan.bench.drive import Action, OnProgress, check_file_limit, drive
from kervan.bench.endpoint import Probe, RequestError, check_can_succeed, find_alphabet, first_look, get_text
from kervan.bench.load import Endpoint, Load
from kervan.bench.prompts import Alphabet
from kervan.bench.reconcile import Counters, Reconciliation
from kervan.bench.result import Result
from kervan.bench.saturation import RateSearchOptions, Search, Trial, TrialResult, Verdict
from kervan.bench.tally import RequestTally
from kervan.config.workload import Slo
from kervan.units import plural

Say = Callable[[str], None]
METRICS_WAIT_S = 5.0
MIN_TRIAL_SHARE = 8 / 60  # of the time that a trial may take: no verdict before


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientOptions:
    """How the client measures. `processes` None: as few as carry the load. `max_processes` bounds that choice."""

    processes: int | None = None
    calibrates: bool = True
    reconciles: bool = True


@dataclass(frozen=True, slots=True)
class Prepared:
    """A server that was looked at, ready to be loaded."""

    endpoint: Endpoint
    probe: Probe
    alphabet: Alphabet
    metrics_at_start: Counters | None = None


def prepare(endpoint: Endpoint, load: Load, *, tokenizer: str | None = None) -> Prepared:
    """Find the model and prompts of exact length.

    A server that is busy or broken is still loaded, and its failures counted; not one at which nothing can succeed.

    `tokenizer`: a directory or a Hugging Face id, for a server that takes no token ids.

    Raises: ConfigError for a load that this server cannot take; FleetError when nothing answers.
    """
    endpoint, probe = first_look(endpoint)
    if not probe.unreached:
        alphabet, probe = find_alphabet(endpoint, load, probe, tokenizer)
    check_can_succeed(endpoint, load, probe)
    return Prepared(endpoint, probe, alphabet)


def measure(
    prepared: Prepared,
    load: Load,
    *,
    slo: Slo = Slo(),  # noqa: B008 - frozen
    client: ClientOptions = ClientOptions(),
    floor: client_floor.ClientFloor | None = None,
    actions: Sequence[Action] = (),
    on_progress: OnProgress | None = None,
    say: Say = lambda _: None,
) -> Result:
    """Load the server and measure. `floor`: of an earlier run at the same streams, to save calibrating again.

    Raises: ConfigError, FleetError.
    """
    if client.calibrates and floor is None:
        say(f"calibrating the client at {plural(load.expected_streams, 'stream')}")
        if client.processes is None:
            floor = client_floor.choose(load.expected_streams)
        else:
            floor = client_floor.measure(load.expected_streams, client.processes)
    num_processes = client.processes or (floor.num_processes if floor else 1)
    check_file_limit(load.expected_streams, num_processes)
    before = _read(prepared.endpoint) if client.reconciles else None
    outcome = drive(
        load,
        prepared.endpoint,
        prepared.alphabet,
        slo=slo,
        num_processes=num_processes,
        actions=actions,
        on_progress=on_progress,
    )
    reconciliation = Reconciliation("unavailable", "not asked for")
    if client.reconciles:
        reconciliation = _reconcile(prepared.endpoint, before, outcome.tally)
    return Result(prepared.endpoint, prepared.probe, load, slo, outcome, floor, reconciliation)


def _read(endpoint: Endpoint) -> Counters | str:
    """The server's counters, or why there are none."""
    try:
        counters = reconcile.read_counters(get_text(endpoint, "/metrics"))
    except RequestError as error:
        return str(error)
    return counters or "/metrics has none of vLLM's counters"


def _reconcile(endpoint: Endpoint, before: Counters | str | None, tally: RequestTally) -> Reconciliation:
    """Compare, again and again for a few seconds: a server counts a request a moment after it has answered it."""
    if not isinstance(before, Counters):
        return Reconciliation("unavailable", before or "")
    deadline_s = time.monotonic() + METRICS_WAIT_S
    while True:
        after = _read(endpoint)
        if not isinstance(after, Counters):
            return Reconciliation("unavailable", after)
        reconciliation = reconcile.compare(tally, after.minus(before))
        if reconciliation.status == "agrees" or time.monotonic() > deadline_s:
            return reconciliation
        time.sleep(0.25)


@dataclass(slots=True)
class Live:
    """The newest state of a run, for a live view."""

    elapsed_s: float = 0.0
    ok: int = 0
    good: int = 0
    errors: int = 0
    in_flight: int = 0
    tokens: int = 0
    tokens_per_s: float = 0.0
    history: list[float] = field(default_factory=list)
    _last: tuple[float, int] = (0.0, 0)

    def update(self, elapsed_s: float, reports: list[WorkerProgress]) -> None:
        """Take the newest reports of all workers."""
        self.elapsed_s = elapsed_s
        for name in ("ok", "good", "errors", "in_flight", "tokens"):
            setattr(self, name, sum(getattr(report, name) for report in reports))
        last_s, last_tokens = self._last
        if elapsed_s - last_s >= 0.9:
            self.tokens_per_s = (self.tokens - last_tokens) / (elapsed_s - last_s)
            self.history = [*self.history[-119:], self.tokens_per_s]
            self._last = (elapsed_s, self.tokens)


@dataclass(frozen=True, slots=True)
class RateSearchResult:
    """The answer of a search: the rate is in [`keeps_up_to`, `breaks_from`). `results` has each trial's run.

    `stopped`: why it ended without an answer: the server took none of a trial's requests.
    """

    slo: Slo
    attain: float
    keeps_up_to: float
    breaks_from: float | None
    trials: tuple[TrialResult, ...]
    results: tuple[Result, ...]
    was_interrupted: bool
    stopped: str = ""

    def doubts(self) -> list[str]:
        """Why trials cannot be believed. That nothing ended in one which broke the SLO is no reason."""
        doubts = [self.stopped] if self.stopped else []
        doubts += [doubt for result in self.results if result.tally.ok for doubt in result.client_doubts()]
        return list(dict.fromkeys(doubts))

    def to_dict(self) -> dict[str, Any]:
        """For JSON and records."""
        trials = [
            {
                "rate": trial.rate,
                "keeps": trial.keeps,
                "good": trial.good,
                "ended": trial.ended,
                "share_ci95": trial.interval,
                "seconds": result.tally.duration_s,
                "out_tok_s": result.out_tok_s,
                "ttft_from_arrival_p99_s": result.quantile("ttft_from_arrival_s", 0.99),
                "tpot_p99_s": result.quantile("tpot_s", 0.99),
                "errors": dict(result.tally.errors),
            }
            for trial, result in zip(self.trials, self.results, strict=True)
        ]
        return {
            "slo": str(self.slo),
            "attain": self.attain,
            "keeps_up_to": self.keeps_up_to,
            "breaks_from": self.breaks_from,
            "interrupted": self.was_interrupted,
            "doubts": self.doubts(),
            "trials": trials,
        }


def find_rate(
    prepared: Prepared,
    load: Load,
    *,
    slo: Slo,
    search: RateSearchOptions = RateSearchOptions(),  # noqa: B008 - frozen
    client: ClientOptions = ClientOptions(),
    say: Say = lambda _: None,
) -> RateSearchResult:
    """The highest rate of `load` at which a share `search.attain` of the requests keeps `slo`.

    Takes up to 16 times `search.max_trial_s`.

    Raises: ConfigError, FleetError.
    """
    progress = Search(search.start_rate)
    client = replace(client, calibrates=False, reconciles=False)
    results: list[Result] = []
    interrupted, stopped = False, ""
    while not interrupted and (rate := progress.next_rate()) is not None:
        judge = _Judge(Trial(rate, search.attain, min_s=search.max_trial_s * MIN_TRIAL_SHARE, max_s=search.max_trial_s))
        trial_load = replace(
            load, streams=None, stages=steady(rate), num_requests=None, duration_s=4 * search.max_trial_s,
            seed=load.seed + len(results),
        )  # fmt: skip
        result = measure(prepared, trial_load, slo=slo, client=client, on_progress=judge.on_progress)
        interrupted = result.outcome.was_interrupted
        if interrupted or judge.verdict is None:
            break
        if not result.tally.ok and result.num_refused == result.tally.num_errors:
            stopped = f"at {rate:.3g} requests/s: {result.server_doubts()[0]}"
            break
        results.append(result)
        progress.trials.append(TrialResult(rate, judge.verdict == "keeps", judge.good, judge.ended))
        word = "keeps" if judge.verdict == "keeps" else "breaks"
        say(f"{rate:.3g} requests/s {word} the SLO: {judge.good} of {judge.ended} good after {judge.elapsed_s:.0f} s")
    return RateSearchResult(
        slo,
        search.attain,
        progress.keeps_up_to,
        progress.breaks_from,
        tuple(progress.trials),
        tuple(results),
        interrupted,
        stopped,
    )


@dataclass(slots=True)
class _Judge:
    """Asks a trial for its verdict at each report, until it has one. `verdict` None: no report has come."""

    trial: Trial
    verdict: Verdict | None = None
    good: int = 0
    ended: int = 0
    elapsed_s: float = 0.0

    def on_progress(self, elapsed_s: float, reports: list[WorkerProgress]) -> bool:
        if self.verdict in (None, "open"):
            self.good, self.ended = sum(r.good for r in reports), sum(r.ok + r.errors for r in reports)
            self.elapsed_s = elapsed_s
            in_flight = sum(r.in_flight for r in reports)
            self.verdict = self.trial.verdict(
                good=self.good, ended=self.ended, in_flight=in_flight, elapsed_s=elapsed_s
            )
        return self.verdict != "open"
