"""What the client itself adds to a measurement, measured before it measures anyone else."""

import math
import multiprocessing
import os
from dataclasses import dataclass

from kervan.bench import pacer
from kervan.bench.drive import check_file_limit, drive
from kervan.bench.load import Endpoint, Load
from kervan.bench.prompts import Alphabet
from kervan.errors import FleetError

MAX_TOKENS_PER_S = 20_000.0
BUSY = 0.7  # of a core; above it, a client waits for itself
TOKENS = 24
TTFT_S = 0.1
MIN_TICK_S = 0.02


@dataclass(frozen=True, slots=True)
class ClientFloor:
    """What one client configuration adds, in seconds at the median and the 99th percentile.

    `ttft_*`: measured TTFT less what the server knows it took. `gap_*`: difference between a measured gap and the
    true one. `busiest_share`: of one core, at `tokens_per_s`.
    """

    streams: int
    num_processes: int
    ttft_s: float
    ttft_p99_s: float
    gap_s: float
    gap_p99_s: float
    cpu_us_per_token: float
    busiest_share: float
    tokens_per_s: float
    has_kernel_time: bool


def measure(streams: int, num_processes: int = 1) -> ClientFloor:
    """The floor at `streams` streams. Takes one to six seconds.

    Raises: FleetError when the client cannot even carry this.
    """
    check_file_limit(streams, num_processes)
    tick_s = max(MIN_TICK_S, streams / MAX_TOKENS_PER_S)
    schedule = pacer.Schedule(TTFT_S, tick_s, TOKENS)
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    server = context.Process(target=pacer.run, args=(schedule, theirs), name="kervan-bench-pacer", daemon=True)
    server.start()
    theirs.close()
    try:
        port = mine.recv()
        load = Load(streams=streams, num_requests=max(4, 2 * streams), isl="16", osl=str(TOKENS), timeout_s=60.0)
        endpoint = Endpoint(url=f"http://127.0.0.1:{port}", model="pacer")
        outcome = drive(load, endpoint, Alphabet(1000), num_processes=num_processes, is_calibration=True)
    except EOFError:
        raise FleetError("the calibration server died; is there enough memory?") from None
    finally:
        mine.close()
        server.join(2)
        if server.is_alive():
            server.kill()
            server.join()
    tally, floor = outcome.tally, outcome.floor
    if not tally.ok or not floor.gap.count:
        raise FleetError(f"the client failed its own calibration at {streams} streams: {tally.errors or 'no answer'}")
    ttft, gap = floor.ttft.quantiles((0.5, 0.99)), floor.gap.quantiles((0.5, 0.99))
    assert ttft[0] is not None and ttft[1] is not None and gap[0] is not None and gap[1] is not None
    return ClientFloor(
        streams=streams,
        num_processes=num_processes,
        ttft_s=ttft[0],
        ttft_p99_s=ttft[1],
        gap_s=gap[0],
        gap_p99_s=gap[1],
        cpu_us_per_token=1e6 * outcome.cpu_s / tally.output_tokens,
        busiest_share=outcome.busiest_share,
        tokens_per_s=tally.output_tokens / max(tally.duration_s, 1e-9),
        has_kernel_time=tally.with_kernel_time == tally.ok,
    )


def choose(streams: int, *, most: int | None = None) -> ClientFloor:
    """The floor with as few processes as carry `streams` without waiting for themselves, at most one per core.

    Raises: FleetError.
    """
    most = most or len(os.sched_getaffinity(0))
    num_processes = 1
    while True:
        floor = measure(streams, num_processes)
        if floor.busiest_share <= BUSY or num_processes >= most:
            return floor
        num_processes = min(most, max(num_processes + 1, math.ceil(num_processes * floor.busiest_share / BUSY)))
