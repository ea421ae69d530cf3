"""What `kervan top` shows for each key and each size of the window."""

import time
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from kervan.cli.live.app import TABS, App
from kervan.config.fleet import FleetConfig
from kervan.fleet.directory import (
    Decided,
    GatewayEntry,
    NodeEntry,
    NodeNotice,
    ReplicaEntry,
    Scaling,
    Snapshot,
    StartFailure,
    Traffic,
)
from kervan.observe.dcgm import DEV, PROF, GpuCounters
from kervan.serve.status import FleetStatus

NOW_S = 1_800_000_000.0
CONFIG = FleetConfig(model="org/model", replicas=2, max_replicas=6, gateways=2, tp=2)
NOTICE = NodeNotice("preemption", "aws", True, NOW_S + 90, NOW_S - 30)
SCALING = Scaling(
    "slo", {"on-demand": 4}, "4 are needed: 9 requests/s", {"load_requests_per_s": 9.0}, since_s=NOW_S - 60,
    history=[
        Decided(NOW_S - 600, {"on-demand": 2}, {"on-demand": 3}, "3 are needed: 7 requests/s"),
        Decided(NOW_S - 60, {"on-demand": 3}, {"on-demand": 4}, "4 are needed: 9 requests/s"),
    ],
)  # fmt: skip
GPU = GpuCounters(
    index=3, uuid="GPU-3", name="NVIDIA H200",
    values={f"{DEV}GPU_UTIL": 97.0, f"{PROF}SM_ACTIVE": 0.615, f"{DEV}FB_USED": 102400.0, f"{DEV}FB_FREE": 41984.0,
            f"{DEV}POWER_USAGE": 512.5, f"{DEV}GPU_TEMP": 47.0, f"{DEV}CLOCKS_EVENT_REASONS": 4.0,
            f"{DEV}XID_ERRORS": 79.0},
)  # fmt: skip


def replica(number: int, **more: Any) -> ReplicaEntry:
    given = {"id": f"on-demand-{number:06x}", "pool": "on-demand", "node": f"10.0.0.{number % 8}", "pid": 100 + number,
             "state": "ready", "running": number, "kv_cache_usage": number / 100}  # fmt: skip
    return ReplicaEntry(**given | more)


def gateway(name: str, moved: int = 0, **rates: float) -> GatewayEntry:
    traffic = {f"on-demand-{int(key[1:]):06x}": Traffic(rate, 0.03, 5, moved) for key, rate in rates.items()}
    return GatewayEntry(name, "10.0.0.1", 9, "http://h:1", "", True, streams=4, moved=moved, traffic=traffic, busy=0.4)


def fleet(num_replicas: int = 4, moved: int = 0, **more: Any) -> FleetStatus:
    entries = [replica(number) for number in range(num_replicas)]
    gateways = [gateway("gw-1", moved, r0=10.0, r1=30.0, r2=20.0), gateway("gw-2", r3=5.0)]
    found = Snapshot(1, entries, gateways, [], targets={"on-demand": 4}, scaling=SCALING, usd_per_h={"on-demand": 30.0})
    return FleetStatus("chat", "http://h:1", CONFIG, structs.replace(found, **more))


def app(*statuses: FleetStatus, **more: Any) -> App:
    made = App(**more)
    for number, status in enumerate(statuses or (fleet(),)):
        made.take(status, NOW_S + number)
    return made


def screen(shown: App, width: int = 100, height: int = 30) -> list[str]:
    return [line.plain.rstrip() for line in shown.lines(width, height, NOW_S)]


def rows(shown: App, **size: int) -> list[str]:
    """Names of the replicas in the order of the table."""
    return [line.split()[0] for line in screen(shown, **size) if line.startswith("on-demand-")]


def press(shown: App, *keys: str) -> App:
    for key in keys:
        shown.press(key)
    return shown


def test_the_head_has_what_the_fleet_does() -> None:
    first, numbers = screen(app())[:2]
    assert first.split()[:6] == ["chat", "4/4", "replicas", "2/2", "gateways", "http://h:1"]
    assert numbers.startswith("tok/s 65") and "streams 8" in numbers and "TTFT 30.0 ms" in numbers


def test_every_view_says_what_it_is_for() -> None:
    shown = app(fleet(), fleet(moved=3))
    assert rows(shown) == [f"on-demand-{n:06x}" for n in range(4)]
    assert any(line.startswith("gw-1") for line in screen(press(shown, "2")))
    scaling = "\n".join(screen(press(shown, "3")))
    assert "4 are needed: 9 requests/s" in scaling and "load_requests_per_s 9" in scaling
    assert scaling.index("on-demand 3 -> 4") < scaling.index("on-demand 2 -> 3")  # the latest first
    assert "2..6" in scaling and "30.00" in scaling
    assert any("gateway gw-1 moved 3 streams: 3 off" in line for line in screen(press(shown, "4")))
    assert "reading" in screen(press(shown, "5"))
    assert shown.wants_gpus and not press(shown, "1").wants_gpus


def test_tabs_and_arrows_go_round() -> None:
    shown = app()
    seen = []
    for _ in TABS:
        seen.append(TABS[shown.tab])
        press(shown, "tab")
    assert tuple(seen) == TABS and shown.tab == 0
    assert press(shown, "left").tab == len(TABS) - 1
    assert press(shown, "right").tab == 0


def test_rows_are_sorted_by_what_s_chooses_and_r_turns_them_round() -> None:
    shown = app()
    press(shown, "s")  # tokens/s: 10, 30, 20, 5
    assert rows(shown) == [f"on-demand-{n:06x}" for n in (1, 2, 0, 3)]
    assert screen(shown)[-1].endswith("by tok/s")
    assert rows(press(shown, "r")) == [f"on-demand-{n:06x}" for n in (3, 0, 2, 1)]
    assert rows(press(shown, "s")) == [f"on-demand-{n:06x}" for n in (3, 2, 1, 0)]  # running, not turned any more


def test_a_chosen_replica_stays_chosen_while_others_come_and_go() -> None:
    shown = app()
    screen(shown)
    press(shown, "down", "j")
    shown.take(fleet(replicas=[replica(n) for n in (1, 2, 3)]), NOW_S)
    press(shown, "d")
    assert screen(shown)[-24:] and any("replica" in line and "on-demand-000002" in line for line in screen(shown))
    shown.take(fleet(replicas=[replica(n) for n in (1, 3)]), NOW_S)
    assert any("replica" in line and "on-demand-000003" in line for line in screen(shown))


def test_the_chosen_row_is_on_the_screen_and_no_row_is_cut_off() -> None:
    shown = app(fleet(200))
    for key, first in (("end", "on-demand-0000c7"), ("home", "on-demand-000000"), ("page down", None)):
        screen(shown, 80, 24)
        press(shown, key)
        found = rows(shown, width=80, height=24)
        assert len(found) >= 12
        assert first is None or first in (found[0], found[-1])


def test_details_have_all_that_is_known() -> None:
    detailed = replica(1, log_path="/var/log/r.log", start_s={"imports": 12.3}, ready_for_s=90.0, leaves_in_s=20.0)
    shown = app(fleet(replicas=[detailed]))
    text = "\n".join(screen(press(shown, "enter"), 100, 40))
    for word in ("/var/log/r.log", "imports 12.3 s", "ready for     90.0 s", "leaves in     20.0 s", "gw-1 30 tok/s"):
        assert word in text
    press(shown, "escape")
    assert rows(shown) == ["on-demand-000001"]


def test_pause_is_said_and_lasts_until_it_is_pressed_again() -> None:
    shown = press(app(), "p")
    assert shown.is_paused and "PAUSED" in screen(shown)[-1]
    assert not press(shown, " ").is_paused
    assert press(shown, "+").every_s == 0.5
    assert press(shown, "-", "-").every_s == 2.0


def test_help_names_every_key_and_any_key_leaves_it() -> None:
    shown = press(app(), "?")
    text = "\n".join(screen(shown))
    assert "quit" in text and "sort by" in text and "pause" in text
    assert not press(shown, "x").shows_help
    assert press(shown, "q").is_over


def test_what_is_wrong_stays_on_top_of_what_was_seen_last() -> None:
    shown = app()
    shown.fail("the directory of fleet 'chat' does not answer", NOW_S)
    shown.fail("the directory of fleet 'chat' does not answer", NOW_S + 1)
    lines = screen(shown)
    assert any("does not answer" in line and "old" in line for line in lines[:4])
    assert rows(shown)
    assert len([what for _, what in shown.history.events if "does not answer" in what]) == 1
    shown.take(fleet(), NOW_S + 2)
    assert not any("old" in line for line in screen(shown)[:4])


def test_a_directory_that_takes_long_is_told_before_it_has_failed() -> None:
    shown = app()
    assert not any("old" in line.plain for line in shown.lines(80, 24, NOW_S + 2))
    assert any(
        "4.00 s old: the directory has not answered yet" in line.plain for line in shown.lines(80, 24, NOW_S + 4)
    )
    press(shown, "p")
    assert not any("old" in line.plain for line in shown.lines(80, 24, NOW_S + 4))


def test_notices_scaling_and_failed_starts_are_seen() -> None:
    failed = StartFailure("on-demand-9", "CapacityError", "out of memory; use --tp 4", number=1)
    stuck = structs.replace(SCALING, problem="no room for 1 more")
    shown = app(fleet(), fleet(nodes=[NodeEntry("10.0.0.3", ["aws"], [NOTICE])], failures=[failed], scaling=stuck))
    text = "\n".join(screen(shown))
    assert "node 10.0.0.3 leaves in 90 s: preemption (aws)" in text
    assert "autoscaling: no room for 1 more" in text and "autoscaling (slo): on-demand 4" in text
    assert "on-demand-9 failed: out of memory; use --tp 4" in text
    page = "\n".join(screen(press(shown, "3"), 100, 40))
    assert "out of memory" in page and "preemption" in page


def test_gpus_of_nodes_and_what_is_not_known_of_others() -> None:
    shown = press(app(), "5")
    shown.gpus = {"10.0.0.1": (GPU,), "10.0.0.2": "nothing answers at port 9400"}
    text = "\n".join(screen(shown, 200, 30))
    row = next(line for line in text.splitlines() if line.startswith("10.0.0.1"))
    for word in ("NVIDIA H200", "97%", "62%", "100/141 GiB", "512 W", "47 C", "software power cap", "Xid 79"):
        assert word in row, (word, row)
    assert "10.0.0.2: nothing answers at port 9400" in text
    details = "\n".join(screen(press(shown, "d"), 100, 30))
    assert "GPU-3" in details and "SM_ACTIVE" in details and "Share of SMs with a warp" in details
    shown.gpus = {"10.0.0.2": "nothing answers at port 9400"}
    assert "kervan observe gpus --listen 9401" in "\n".join(screen(shown))


def test_what_logs_and_models_are_called_gives_the_terminal_no_commands() -> None:
    evil = "\x1b[2Jgone\r\nnext\x07"
    failed = StartFailure("r\x1b]0;title\x07", "EngineError", evil, number=1)
    status = fleet(replicas=[replica(1, reason=evil, state="unhealthy")], failures=[failed])
    shown = app(fleet(), FleetStatus("chat", "http://h:1", FleetConfig(model="m" + evil), status.snapshot))
    for tab in "12345":
        for details in ("", "d"):
            press(shown, tab, *details)
            assert all(line.plain.isprintable() for line in shown.lines(200, 50, NOW_S))


def test_ascii_alone_where_the_terminal_has_no_more() -> None:
    shown = app(fleet(), fleet(), is_unicode=False)
    shown.gpus = {"10.0.0.1": (GPU,)}
    for tab in "12345":
        for details in ("", "d"):
            press(shown, tab, *details)
            assert all(line.isascii() for line in screen(shown, 200, 60))
    assert any("█" in line for line in screen(app(), 200, 60))


KEYS = st.sampled_from([*"qsSrp?dkjhlgG12345+-", "up", "down", "page up", "page down", "home", "end", "enter", "escape",
                        "tab", "back tab", "left", "right"])  # fmt: skip


@settings(deadline=None, max_examples=25)  # of up to 30 screens each
@given(
    st.lists(KEYS, max_size=30), st.integers(1, 220), st.integers(1, 70), st.integers(0, 40),
    st.booleans(),
)  # fmt: skip
def test_every_key_in_every_window_leaves_a_screen_that_fits(
    keys: list[str], width: int, height: int, num_replicas: int, is_late: bool
) -> None:
    shown = app(fleet(num_replicas), fleet(max(0, num_replicas - 1), moved=2))
    shown.gpus = {"10.0.0.1": (GPU,), "10.0.0.2": "no"}
    if is_late:
        shown.fail("the directory is away", NOW_S)
    for key in keys:
        press(shown, key)
        lines = shown.lines(width, height, NOW_S)
        assert len(lines) <= height and all(line.cell_len <= width for line in lines)


def test_a_small_window_has_the_table_and_a_large_one_more() -> None:
    small = screen(app(), 40, 10)
    assert len(small) == 10 and rows(app(), width=40, height=10) == [f"on-demand-{n:06x}" for n in range(4)]
    large = screen(app(), 200, 60)
    assert "served" in "\n".join(large) and any(line.startswith("gw-1") for line in large)


def test_times_of_events_are_of_this_machine() -> None:
    shown = app(fleet(), fleet(3))
    at = time.strftime("%X", time.localtime(NOW_S + 1))
    assert shown.history.events[-1] == (at, "replica on-demand-000003 is gone (was ready)")
