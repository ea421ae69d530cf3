"""`kervan top`: a fleet, live in the terminal."""

import select
import sys
import time
from collections.abc import Callable

import click
from rich.console import Console
from rich.text import Text

from kervan.cli import option_types, options
from kervan.cli.live import columns, pages
from kervan.cli.live.app import App
from kervan.cli.live.feed import Feed, Frame
from kervan.cli.live.history import History, totals, traffic
from kervan.cli.live.table import printable, table
from kervan.cli.live.terminal import Terminal, is_unicode
from kervan.cli.render import print_json, print_partial_status, progress_lines
from kervan.errors import ConfigError, FleetError, KervanError
from kervan.serve.status import FleetStatus
from kervan.serve.why import notice_lines, scaling_lines

MIN_EVERY_S = 0.2
PIPE_WIDTH = 160
CONNECT_NEWS_S = 2.0
RESTARTS_S = (2.0, 5.0, 10.0, 30.0)  # between processes that ask Ray, when one after the other has ended


def view(status: FleetStatus, width: int) -> list[Text]:
    """All of a fleet, one below the other: head, scaling, replicas, gateways, notices."""
    snapshot, config = status.snapshot, status.config
    found = totals(snapshot)
    about = f"  {status.url or '(no gateway yet)'}  {printable(config.model)}  tp {config.tp}, pp {config.pp}"
    numbers = f"{found.streams:,} streams, {found.held:,} held, {found.tokens_per_s:,.0f} tok/s, "
    lines = [
        Text.assemble((printable(status.name), "bold"), about),
        *map(Text, pages.wrapped(f"{numbers}TTFT {columns.duration(found.ttft_s)}", width)),
    ]
    if snapshot.scaling is not None and config.autoscaler is not None:
        lines += [Text(printable(line)) for line in scaling_lines(snapshot.scaling, last=0)]
        lines += [Text(printable(line), "yellow") for line in (snapshot.scaling.problem,) if line]
    history = History()  # there is no past in one look, and so no pictures of it
    replicas = [c for c in columns.replica_columns(snapshot, history, 80, is_unicode=False) if "so far" not in c.title]
    gateways = [c for c in columns.gateway_columns(history, 80, is_unicode=False) if "so far" not in c.title]
    lines += [Text(), *table(replicas, snapshot.replicas, width), Text(), *table(gateways, snapshot.gateways, width)]
    notices = [
        Text(line, "yellow") for notice in notice_lines(snapshot, time.time()) for line in pages.wrapped(notice, width)
    ]
    return [*lines, *([Text(), *notices] if notices else [])]


def to_dict(status: FleetStatus) -> dict[str, object]:
    """`kervan status --json` with traffic."""
    content = status.to_dict()
    for replica in content["replicas"]:
        rates = traffic(status.snapshot, replica["id"])
        replica |= {"tokens_per_s": round(rates.tokens_per_s, 1), "ttft_s": rates.ttft_s}
    for shown, gateway in zip(content["gateways"], status.snapshot.gateways, strict=True):
        shown |= {"streams": gateway.streams, "held": gateway.held, "moved": gateway.moved}
    return content


@click.command()
@options.name
@options.address
@click.option(
    "--every", "every_s", type=option_types.DURATION, default="1s", show_default=True, help="At least 0.2s.",
)  # fmt: skip
@click.option("--once", is_flag=True, help="Print one screen and exit; the default without a terminal.")
@options.as_json
def top(name: str, address: str | None, every_s: float, once: bool, as_json: bool) -> None:
    """Watch a fleet: load, tokens/s and TTFT of each replica, gateways, scaling, events, GPUs. Keys: ? lists them.

    Numbers are of the last second. TTFT is from the moment a gateway placed a request on the replica. NO_COLOR is
    followed; graphs are ASCII where the locale is not UTF-8.
    """
    if every_s < MIN_EVERY_S:
        raise ConfigError(f"--every {every_s:g} s is below {MIN_EVERY_S:g} s; write for example --every 1s")
    console = Console(highlight=False)
    if not as_json and not once and console.is_terminal and not console.is_dumb_terminal and sys.stdout.isatty():
        _follow(console, name, address, every_s)
        return
    from kervan.serve.status import FleetWatch

    try:
        status = FleetWatch(name, address).look()
    except FleetError as error:
        print_partial_status(name, error, as_json=as_json)
        raise
    if as_json:
        print_json(to_dict(status))
        return
    width = console.width if sys.stdout.isatty() else PIPE_WIDTH
    console = Console(highlight=False, width=width)
    for line in view(status, width):
        console.print(line, no_wrap=True, overflow="crop", crop=True)


def _follow(console: Console, name: str, address: str | None, every_s: float) -> None:
    """Until the user has seen enough."""
    feed = Feed(name, address)
    try:
        try:
            first = _first(feed)
            status = first.status()
        except FleetError as error:
            print_partial_status(name, error, as_json=False)
            raise
        app = App(is_unicode=is_unicode(), every_s=every_s)
        app.take(status, time.time())
        with Terminal() as terminal:
            feed = _Follower(app, feed, lambda: Feed(name, address)).run(terminal, painter(console))
    finally:
        feed.close()


def _first(feed: Feed) -> Frame:
    """The first frame; nothing is on the screen yet, and an error ends the command as any other's."""
    feed.request(with_gpus=False)
    tell, is_told, begin_s = progress_lines(), False, time.monotonic()
    while True:
        select.select([feed], [], [], 0.5)
        if (frame := feed.read()) is not None:
            return frame
        if feed.is_over:
            raise FleetError("the process that asks Ray ended by itself; kervan status shows why")
        if not is_told and time.monotonic() - begin_s > CONNECT_NEWS_S:
            tell("joining the Ray cluster")
            is_told = True


def painter(console: Console) -> Callable[[list[Text], int], list[str]]:
    """Turns lines into what a terminal takes, of the full width each."""

    def paint(lines: list[Text], width: int) -> list[str]:
        with console.capture() as captured:
            for line in lines:
                line.truncate(width, overflow="crop", pad=True)
                console.print(line, width=width, no_wrap=True, overflow="crop", crop=True)
        return captured.get().split("\n")[: len(lines)]

    return paint


class _Follower:
    """Asks, waits, draws."""

    def __init__(self, app: App, feed: Feed, begin_feed: Callable[[], Feed]) -> None:
        self._app = app
        self._feed = feed
        self._begin_feed = begin_feed
        self._num_restarts = 0
        self._due_s = 0.0  # of the next look, or of the next process that asks

    def run(self, terminal: Terminal, paint: Callable[[list[Text], int], list[str]]) -> Feed:
        """Until the user quits; the process that asked last, to be closed."""
        app = self._app
        self._due_s = time.monotonic() + app.every_s
        while not app.is_over:
            width, height = terminal.size
            terminal.draw(paint(app.lines(width, height, time.time()), width))
            now_s = time.monotonic()
            if now_s >= self._due_s and not app.is_paused:
                self._ask(now_s)
            wait_s = max(self._due_s - time.monotonic(), 0.0)
            if app.is_paused or (self._feed.is_asked and wait_s == 0.0):
                wait_s = 1.0  # the times on the screen go on
            pressed, ready = terminal.wait(wait_s, [] if self._feed.is_over else [self._feed.fileno()])
            for key in pressed:
                before = app.wants_gpus
                app.press(key)
                if app.wants_gpus and not before:
                    self._due_s = 0.0
            if ready:
                self._read()
        return self._feed

    def _ask(self, now_s: float) -> None:
        self._due_s = now_s + self._app.every_s
        if self._feed.is_over:
            self._feed.close()
            self._feed = self._begin_feed()
        self._feed.request(with_gpus=self._app.wants_gpus)

    def _read(self) -> None:
        app, frame = self._app, self._feed.read()
        if self._feed.is_over:
            wait_s = RESTARTS_S[min(self._num_restarts, len(RESTARTS_S) - 1)]
            self._num_restarts += 1
            self._due_s = time.monotonic() + wait_s
            app.fail(app.problem or "the process that asks Ray has ended; another one asks soon", time.time())
        if frame is None:
            return
        if frame.gpus is not None:
            app.gpus = frame.gpus
        try:
            app.take(frame.status(), time.time())
            self._num_restarts = 0
        except KervanError as error:
            app.fail(str(error), time.time())
