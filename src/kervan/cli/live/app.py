"""What `kervan top` shows and how its keys change that. Pure: statuses and keys in, lines of the screen out."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.text import Text

from kervan.cli.live import columns, pages
from kervan.cli.live.columns import GpuRow, Order
from kervan.cli.live.history import History, totals
from kervan.cli.live.spark import spark
from kervan.cli.live.table import printable, table
from kervan.observe.dcgm import GpuCounters
from kervan.serve.status import FleetStatus
from kervan.serve.why import notice_lines, scaling_lines
from kervan.units import format_duration

TABS = ("replicas", "gateways", "scaling", "events", "GPUs")
KEYS = (
    ("q", "quit (also Ctrl-C)"),
    ("1 to 5, tab, left, right", "another view"),
    ("up, down, k, j, page up, page down, home, end", "choose a row"),
    ("d or enter", "details of the row, and back (also escape)"),
    ("s, S", "sort by the next, the previous column"),
    ("r", "turn the order round"),
    ("p or space", "pause, and go on"),
    ("+, -", "look more often, less often"),
    ("?", "this help, and back"),
)
INTERVALS_S = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
SILENT_S = 2.0  # an answer that takes longer is missed
TALL, WIDE = 16, 60  # lines and columns from which there is room for more than the table


@dataclass
class _Place:
    """Where the user is in one tab."""

    chosen: str = ""
    number: int = 0
    offset: int = 0
    order: int = 0
    is_turned: bool = False


@dataclass
class App:
    """The state of the screen. `gpus`: by node, or why there are none; None until they were asked for."""

    is_unicode: bool = True
    every_s: float = 1.0
    history: History = field(default_factory=History)
    status: FleetStatus | None = None
    seen_s: float = 0.0
    problem: str = ""
    gpus: dict[str, tuple[GpuCounters, ...] | str] | None = None
    tab: int = 0
    is_paused: bool = False
    is_over: bool = False
    shows_help: bool = False
    shows_details: bool = False
    _places: list[_Place] = field(default_factory=lambda: [_Place() for _ in TABS])
    _page: int = 1  # rows that the table showed last
    _rows: list[str] = field(default_factory=list)  # their names in the order that was shown last

    @property
    def wants_gpus(self) -> bool:
        """Whether GPUs have to be read."""
        return TABS[self.tab] == "GPUs"

    def take(self, status: FleetStatus, now_s: float) -> None:
        """What the directory says now. `now_s`: Unix time."""
        self.status, self.seen_s, self.problem = status, now_s, ""
        self.history.take(status, now_s)

    def fail(self, problem: str, now_s: float) -> None:
        """The directory does not answer; what was seen last stays on the screen."""
        if problem != self.problem:
            self.history.events.append((time.strftime("%X", time.localtime(now_s)), problem))
        self.problem = problem

    # ---- keys

    def press(self, key: str) -> None:
        """A key, by the names of `kervan.cli.live.terminal`."""
        place = self._places[self.tab]
        moves = {"up": -1, "k": -1, "down": 1, "j": 1, "page up": -self._page, "page down": self._page,
                 "home": -(1 << 30), "g": -(1 << 30), "end": 1 << 30, "G": 1 << 30}  # fmt: skip
        turns = {"tab": 1, "right": 1, "l": 1, "back tab": -1, "left": -1, "h": -1}
        if key == "q":
            self.is_over = True
        elif key == "?":
            self.shows_help = not self.shows_help
        elif self.shows_help:
            self.shows_help = False
        elif key in moves:
            self._choose(place, moves[key])
        elif key in turns:
            self._open((self.tab + turns[key]) % len(TABS))
        elif key.isdecimal() and 1 <= int(key) <= len(TABS):
            self._open(int(key) - 1)
        elif key in ("d", "enter"):
            self.shows_details = not self.shows_details
        elif key == "escape":
            self.shows_details = False
        elif key in ("s", "S"):
            place.order, place.is_turned = place.order + (1 if key == "s" else -1), False
        elif key == "r":
            place.is_turned = not place.is_turned
        elif key in ("p", " "):
            self.is_paused = not self.is_paused
        elif key in ("+", "="):
            self.every_s = max((s for s in INTERVALS_S if s < self.every_s), default=self.every_s)
        elif key == "-":
            self.every_s = min((s for s in INTERVALS_S if s > self.every_s), default=self.every_s)

    def _open(self, tab: int) -> None:
        self.tab, self.shows_details = tab, False

    def _choose(self, place: _Place, by: int) -> None:
        if self._rows:
            now = self._rows.index(place.chosen) if place.chosen in self._rows else place.number
            place.number = max(0, min(len(self._rows) - 1, now + by))
            place.chosen = self._rows[place.number]

    # ---- the screen

    def lines(self, width: int, height: int, now_s: float) -> list[Text]:
        """At most `height` lines of at most `width` characters. `now_s`: Unix time."""
        if self.status is None:
            return [Text(printable(self.problem or "connecting")[:width])]
        head = self._head(self.status, width, height, now_s)
        foot = [self._foot(width)] if height >= 6 else []
        room = max(1, height - len(head) - len(foot))
        page = pages.help_page(KEYS, width) if self.shows_help else self._body(self.status, width, room, now_s)
        body = page[:room]
        body = [*body, *self._news(width, room - len(body))]
        body += [Text() for _ in range(room - len(body))]
        lines = [*head, *body[:room], *foot]
        for line in lines:
            line.truncate(width, overflow="crop")
        return lines[:height]

    def _head(self, status: FleetStatus, width: int, height: int, now_s: float) -> list[Text]:
        snapshot, config = status.snapshot, status.config
        ready = sum(r.state == "ready" and not r.lateness for r in snapshot.replicas)
        target = sum(snapshot.targets.values()) or config.replicas
        doors = sum(g.is_ready and not g.lateness for g in snapshot.gateways)
        first = Text.assemble((printable(status.name), "bold"))
        first.append(f"  {ready}/{target} replicas", "green" if ready >= target else "yellow")
        first.append(f"  {doors}/{len(snapshot.gateways)} gateways", "green" if doors else "red")
        layout = f"tp {config.tp}, pp {config.pp}"
        for part in (status.url or "(no gateway yet)", printable(config.model), layout):
            if first.cell_len + 2 + len(part) <= width:
                first.append(f"  {part}")
        lines = [first, self._numbers(status, width)]
        age_s = max(0.0, now_s - self.seen_s)
        problem = self.problem
        if not problem and not self.is_paused and age_s > SILENT_S + self.every_s:
            problem = "the directory has not answered yet"
        alerts = [Text(f"{format_duration(age_s)} old: {printable(problem)}", "bold red")] if problem else []
        alerts += [Text(printable(line), "yellow") for line in notice_lines(snapshot, now_s)]
        if snapshot.scaling is not None and snapshot.scaling.problem:
            alerts.append(Text(printable(f"autoscaling: {snapshot.scaling.problem}"), "yellow"))
        if snapshot.scaling is not None and config.autoscaler is not None and height >= TALL:
            alerts.append(Text(printable(scaling_lines(snapshot.scaling, last=0)[0])))
        most = 1 if height < TALL else 4
        if len(alerts) > most:
            alerts = [*alerts[: most - 1], Text(f"{len(alerts) - most + 1} more: see scaling (3)", "yellow")][:most]
        lines += alerts
        if height >= TALL:
            lines.append(Text())
        if height >= 5:
            lines.append(self._tabs(width))
        return lines

    def _numbers(self, status: FleetStatus, width: int) -> Text:
        found, seen = totals(status.snapshot), self.history.total
        parts: list[tuple[str, str, Any]] = [
            ("tok/s", f"{found.tokens_per_s:,.0f}", seen.tokens_per_s),
            ("streams", f"{found.streams:,}", seen.streams),
            ("TTFT", columns.duration(found.ttft_s), seen.ttft_s),
            ("held", f"{found.held:,}", seen.held),
        ]
        plain = sum(len(name) + len(value) + 3 for name, value, _ in parts)
        length = min(40, max(0, (width - plain) // len(parts) - 1))
        line = Text(no_wrap=True)
        for name, value, values in parts:
            if line.cell_len + len(name) + 1 + len(value) > width:
                break
            line.append(f"{name} ", "dim")
            line.append(value, "bold" if name != "held" or not found.held else "bold red")
            if length >= 4:
                line.append(f" {spark(values, length, is_unicode=self.is_unicode)}", "cyan")
            line.append("  ")
        return line

    def _tabs(self, width: int) -> Text:
        names = TABS if width >= WIDE else [name[:4] for name in TABS]
        line = Text(no_wrap=True)
        for number, name in enumerate(names):
            line.append(f" {number + 1} {name} ", "reverse bold" if number == self.tab else "")
        return line

    def _foot(self, width: int) -> Text:
        orders = self._orders()
        words = ["PAUSED"] if self.is_paused else [f"every {self.every_s:g} s"]
        if orders is not None:
            words.append(f"by {self._order(orders).title}")
        right = "  ".join(words)
        left = "q quit  s sort  d details  p pause  ? help"
        if width < len(left) + len(right) + 2:
            left = "q quit  ? help"
        line = Text(left, "dim")
        line.append(" " * max(1, width - len(left) - len(right)))
        line.append(right, "bold yellow" if self.is_paused else "dim")
        return line

    def _news(self, width: int, room: int) -> list[Text]:
        """The latest events below a table that leaves room for them."""
        if TABS[self.tab] == "events" or self.shows_help or room < 4 or not self.history.events:
            return []
        shown = list(self.history.events)[-min(room - 2, 8) :]
        return [Text(), Text("latest events (4)", "dim"), *(pages.event_line(event, width) for event in shown)]

    # ---- the parts of the views

    def _orders(self) -> list[Order] | None:
        if self.status is None or self.shows_help:
            return None
        return {
            "replicas": lambda: columns.replica_orders(self.status.snapshot) if self.status else [],
            "gateways": lambda: columns.GATEWAY_ORDERS,
            "GPUs": lambda: columns.GPU_ORDERS,
        }.get(TABS[self.tab], lambda: None)()

    def _order(self, orders: Sequence[Order]) -> Order:
        return orders[self._places[self.tab].order % len(orders)]

    def _body(self, status: FleetStatus, width: int, room: int, now_s: float) -> list[Text]:
        name = TABS[self.tab]
        snapshot = status.snapshot
        if name == "replicas":
            shown = self._table(
                snapshot.replicas,
                columns.replica_columns(snapshot, self.history, width, is_unicode=self.is_unicode),
                lambda r: pages.replica_page(r, snapshot, self.history, width, is_unicode=self.is_unicode),
                "no replica is there: kervan status --why says what is missing",
                width, room,
            )  # fmt: skip
            if not self.shows_details and len(shown) + len(snapshot.gateways) + 2 <= room and room >= TALL:
                doors = columns.gateway_columns(self.history, width, is_unicode=self.is_unicode)
                shown += [Text(), *table(doors, snapshot.gateways, width)]
            return shown
        if name == "gateways":
            return self._table(
                snapshot.gateways,
                columns.gateway_columns(self.history, width, is_unicode=self.is_unicode),
                lambda g: pages.gateway_page(g, self.history, width, is_unicode=self.is_unicode),
                "no gateway is there: kervan status --why says what is missing",
                width, room,
            )  # fmt: skip
        if name == "GPUs":
            return self._gpus(width, room)
        if name == "scaling":
            return self._scrolled(pages.scaling_page(status, width, now_s), room)
        found = [line for event in reversed(self.history.events) for line in pages.wrapped_event(event, width)]
        return self._scrolled(found or [Text("nothing has happened since this command began", "dim")], room)

    def _gpus(self, width: int, room: int) -> list[Text]:
        if self.gpus is None:
            return [Text("reading", "dim")]
        rows: list[GpuRow] = []
        silent: list[Text] = []
        for node, found in self.gpus.items():
            if isinstance(found, str):
                silent.append(Text(printable(f"{node}: {found}"), "dim"))
            else:
                rows += [GpuRow(node, gpu) for gpu in found]
        if not rows:
            silent.append(Text("on each node with GPUs: dcgm-exporter, or kervan observe gpus --listen 9401", "dim"))
            return self._scrolled(silent, room)
        kept = min(len(silent), max(0, room // 4))
        shown = self._table(
            rows, columns.gpu_columns(width, is_unicode=self.is_unicode), lambda row: pages.gpu_page(row, width), "",
            width, room - kept,
        )  # fmt: skip
        return [*shown, *silent[:kept]]

    def _table(
        self,
        rows: Sequence[Any],
        made: Sequence[Any],
        details: Callable[[Any], list[Text]],
        nothing: str,
        width: int,
        room: int,
    ) -> list[Text]:
        place, orders = self._places[self.tab], self._orders()
        if not rows or not orders:
            self._rows = []
            return [Text(nothing, "yellow")]
        order = self._order(orders)
        ordered = sorted(rows, key=order.key, reverse=order.is_descending != place.is_turned)
        self._rows = [row.id for row in ordered]
        if place.chosen in self._rows:
            place.number = self._rows.index(place.chosen)
        else:  # it is gone: the one that is in its place now
            place.number = min(place.number, len(ordered) - 1)
            place.chosen = self._rows[place.number]
        if self.shows_details:
            return details(ordered[place.number])[:room]
        self._page = max(1, room - 1)
        place.offset = _offset(place.offset, place.number, len(ordered), self._page)
        shown = ordered[place.offset : place.offset + self._page]
        return table(made, shown, width, chosen=place.number - place.offset, bold=order.title)

    def _scrolled(self, found: list[Text], room: int) -> list[Text]:
        """Lines that are no rows: the chosen one is at the top, as far as there are more below."""
        place = self._places[self.tab]
        self._rows = [str(number) for number in range(max(1, len(found) - room + 1))]
        place.number = min(place.number, len(self._rows) - 1)
        place.chosen = self._rows[place.number]
        self._page = max(1, room - 1)
        return found[place.number : place.number + room]


def _offset(before: int, chosen: int, count: int, page: int) -> int:
    """The first row that is shown, so that the chosen one is, and no room is left below that rows could have."""
    offset = min(max(before, chosen - page + 1), chosen)
    return max(0, min(offset, count - page))
