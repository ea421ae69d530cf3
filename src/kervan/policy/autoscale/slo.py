"""The default policy: as few replicas as keep the SLO, also while the load rises as it has risen before.

Every few seconds:

1. `load.py` tells the level of the load, in requests per second of mean lengths, and by how much it rose before within
   the time from a decision to a ready replica.
2. `replica_rate.py` tells what one replica takes within the SLO, corrected by what is seen.
3. A number of replicas is enough when it takes the level, and when of all requests that come while the load rises no
   more than `EXPECTED_LOSS` would miss the SLO (`expected_loss`): a rise first fills places that are free, then a queue
   that is as long as the bound on TTFT allows, and only then are requests late.
4. What waits already is to be gone soon after the replicas that are starting are ready.

More are asked for at once. Fewer only when fewer were enough, with margin, for as long as `hold_s`: half of a start,
and twice as long each time that a replica was missed within two starts after it had gone. So a load between two numbers
does not change the number for ever.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kervan.config.autoscale import ScheduledMinimum
from kervan.config.workload import Slo
from kervan.policy.autoscale import decisions, to_zero
from kervan.policy.autoscale.correction import Correction, pressure
from kervan.policy.autoscale.late_budget import LateBudget
from kervan.policy.autoscale.learned_rate import LearnedRate
from kervan.policy.autoscale.load import Load
from kervan.policy.autoscale.replica_rate import ModelledRates, ReplicaRate
from kervan.policy.autoscale.state import Decision, Demand, FleetState, ReplicaModel

KEPT_SHARE = 0.99  # of the requests are to keep the SLO
EXPECTED_LOSS = (1 - KEPT_SHARE) / 2  # by rises; the other half is for everything else
MARGIN = 0.5  # of EXPECTED_LOSS is allowed in a smaller fleet
FULL = 0.97  # of what replicas take may be in use; before one leaves, of what those that stay take, LESS
LESS = 0.90
SEEN_S = 5.0  # from a rise to the decision, and from the decision to Serve's start
RECOVERY = 0.25  # of a start: how long requests are late after the replicas that were missing are ready
LONGEST_DECISION_S, SHORTEST_DECISION_S = 5.0, 1.0
DECISIONS_PER_START = 20.0
LEAST_HOLD_S = 15.0
WATCHED_S = 300.0  # a load is watched for so long before a replica leaves
MOST_REGRETS = 5.0
FORGIVEN_HOLDS = 10.0  # after so many times `hold_s` without one, a regret is forgotten
NEWS_S = 15.0  # older news of the gateways are none


@dataclass(frozen=True, slots=True, kw_only=True)
class SloSettings:
    """What the user asks for. Delays: None leaves them to the policy."""

    slo: Slo
    schedule: tuple[ScheduledMinimum, ...] = ()
    upscale_delay_s: float = 0.0
    downscale_delay_s: float | None = None
    to_zero_s: float = to_zero.IDLE_S


class SloPolicy:
    """See the module. `model`: None where nothing is known of the replicas: their rate is learned then."""

    name = "slo"

    def __init__(self, settings: SloSettings, model: ReplicaModel | None = None) -> None:
        self._settings = settings
        self._model = model
        self._rates = None if model is None else ModelledRates(model, settings.slo)

    def decide(self, state: FleetState, memory: Mapping[str, Any]) -> Decision:
        """See `Policy`."""
        demand = state.demand
        if demand is None or state.demand_age_s > NEWS_S:
            age = f" for {state.demand_age_s:.0f} s" if state.demand_age_s else ""
            return decisions.kept(state, memory, f"no news from the gateways{age}")
        remembered: dict[str, Any] = dict(memory)
        start_s = max((pool.start_s for pool in state.pools if pool.maximum), default=0.0)
        block_s = start_s + SEEN_S
        load = Load.from_memory(memory.get("load", {}))
        dt = state.now_s - memory.get("now_s", state.now_s - demand.window_s)
        remembered["now_s"] = state.now_s
        load.observe(
            window_s=demand.window_s if dt > 0 else 0.0,
            arrived=demand.arrived,
            prompt_tokens=demand.arrived_prompt_tokens,
            finished=demand.finished,
            output_tokens=demand.finished_output_tokens,
            good=demand.finished_good,
            in_flight=demand.held + demand.queued + demand.running,
            is_calm=memory.get("is_calm", False),
            prompt_share=memory.get("prompt_share", 0.5),
            block_s=block_s,
            stay_s=memory.get("stay_s", 1.0),
            wait_s=memory.get("wait_s", 0.0),
            replica_rate=memory.get("replica_rate", 1.0),
        )
        remembered["load"] = load.to_memory()
        budget = LateBudget.from_memory(memory.get("budget", {}))
        if dt > 0:
            budget.observe(dt=demand.window_s, finished=demand.finished, good=demand.finished_good, refused=demand.shed)
        remembered["budget"] = budget.to_memory()
        within = decisions.bounds(state, self._settings.schedule)
        every_s = min(LONGEST_DECISION_S, max(SHORTEST_DECISION_S, start_s / DECISIONS_PER_START))
        is_due = state.now_s - memory.get("sized_s", -math.inf) >= every_s or demand.held > 0
        if is_due:
            self._size(state, demand, load, remembered, start_s, block_s, within)
            remembered["sized_s"] = state.now_s
        total = self._held(state, remembered, within, start_s)
        if within.scheduled and remembered["needed"] < within.minimum == total:
            remembered["why"] += f"; {total} by the schedule {within.scheduled!r}"
        return decisions.decision(
            state, total, within, remembered["why"], numbers=remembered["numbers"], memory=remembered
        )

    # ---- how many are needed

    def _size(
        self,
        state: FleetState,
        demand: Demand,
        load: Load,
        memory: dict[str, Any],
        start_s: float,
        block_s: float,
        within: decisions.Bounds,
    ) -> None:
        """Writes `needed`, `less` (enough with margin), `why` and `numbers` into the memory."""
        ready = state.count("ready")
        in_flight = demand.held + demand.queued + demand.running
        level = load.level
        if self._rates is None:
            rate = LearnedRate.from_memory(memory.get("learned", {})).rate(self._settings.slo)
        else:
            rate = self._rates.at(load.mean_prompt_tokens, load.mean_output_tokens, load.arrivals_cv2, load.prompts_cv2)
        correction = Correction.from_memory(memory.get("correcting", {})).factor
        self._learn(state, demand, load, memory, rate, ready, in_flight, level)
        memory["prompt_share"] = rate.prompt_share
        budget = LateBudget.from_memory(memory["budget"])
        each = rate.requests_per_s * correction * budget.reserve(1 - KEPT_SHARE)
        memory["stay_s"], memory["wait_s"], memory["replica_rate"] = rate.stay_s, rate.wait_s, each
        most = max(within.maximum, 1)
        loss = EXPECTED_LOSS * budget.factor(1 - KEPT_SHARE)
        needed = enough(load, level, each, block_s, most, full=FULL, loss=loss)
        less = max(needed, enough(load, level, each, block_s, most, full=LESS, loss=MARGIN * loss))
        cleared, waiting_s = self._for_backlog(state, demand, level, each, rate, start_s)
        if memory.get("idle_least") is not None:
            del memory["idle_least"]
        least = 1
        if sum(pool.minimum for pool in state.pools) == 0:
            idle = to_zero.decide(
                demand, decisions.asked(state, memory), memory.get("idle_since_s"),
                now_s=state.now_s, idle_s=self._settings.to_zero_s,
            )  # fmt: skip
            memory["idle_since_s"], least = idle.idle_since_s, idle.at_least
            if not least:
                needed = less = 0
        need = max(needed, cleared, least)
        memory["needed"], memory["less"] = need, max(less, need)
        usual = load.usual_rise(level, block_s, loss)
        memory["numbers"] = {
            "load_requests_per_s": round(level, 3),
            "rise_requests_per_s": round(usual, 3),
            "replica_requests_per_s": round(each, 4),
            "prompt_tokens": round(load.mean_prompt_tokens),
            "output_tokens": round(load.mean_output_tokens),
            "correction": round(correction, 3),
            "queue_s": round(waiting_s, 2),
            "ready": float(ready),
            "starting": float(state.count("starting")),
            "start_s": round(start_s, 1),
            "needed": float(need),
        }
        why = (
            f"{level:.3g} requests/s, {usual:.2g} more within a start of {start_s:.0f} s; a replica takes {each:.3g}/s"
        )
        if not least:
            why = f"idle for {self._settings.to_zero_s:g} s"
        elif cleared > needed:
            why = f"{demand.held + demand.queued} requests wait {waiting_s:.1f} s; " + why
        if rate.relaxed and least:
            why += f"; {rate.relaxed}: that is kept instead which a replica can"
        memory["need_why"] = why

    def _for_backlog(
        self, state: FleetState, demand: Demand, level: float, each: float, rate: ReplicaRate, start_s: float
    ) -> tuple[int, float]:
        """(replicas that clear what waits soon after a start, seconds that what waits takes now)."""
        waiting = demand.held + demand.queued
        ready = state.count("ready")
        if self._model is None:  # a queue of so many, which moves on at what comes in (Little's law)
            work_s = waiting / each if waiting > 2 * ready else 0.0
            wait_s = waiting / max(level, each) if waiting > 2 * ready else 0.0
        else:
            # The least that the queue costs: its prompts; if places are what is missing, whole requests.
            work_s = (demand.held_tokens + demand.queued_tokens) / self._model.prefill_tokens_per_s
            if demand.running >= 0.9 * ready * rate.places:
                work_s = max(work_s, waiting / each)
            wait_s = work_s / max(1, ready)
        if wait_s <= rate.wait_s and not demand.held:
            return 0, wait_s
        ready_at = sorted(max(0.0, start_s - r.age_s) for r in state.replicas if r.phase == "starting")
        left = work_s * each
        for here, upto_s in zip(range(ready, ready + len(ready_at) + 1), [*ready_at, start_s], strict=True):
            before_s = ready_at[here - ready - 1] if here > ready else 0.0
            left = max(0.0, left + (level - here * each) * max(0.0, upto_s - before_s))
        clear_s = max(10.0, start_s / 2)
        return math.ceil((level + left / clear_s) / each - 1e-9), wait_s

    # ---- what is seen

    def _learn(
        self,
        state: FleetState,
        demand: Demand,
        load: Load,
        memory: dict[str, Any],
        rate: ReplicaRate,
        ready: int,
        in_flight: int,
        level: float,
    ) -> None:
        dt = min(10.0, state.now_s - memory.get("sized_s", state.now_s))
        if not ready or dt <= 0:
            return
        waiting = demand.held + demand.queued
        pressed = pressure(demand, self._settings.slo)
        if self._rates is None:
            learned = LearnedRate.from_memory(memory.get("learned", {}))
            learned.observe(
                per_replica=level / ready, finished=load.finish_rate / ready, in_flight=in_flight / ready,
                waiting=waiting / ready, good=load.good, pressure=pressed, dt=dt,
            )  # fmt: skip
            memory["learned"] = learned.to_memory()
        correction = Correction.from_memory(memory.get("correcting", {}))
        if ready != memory.get("ready"):
            memory["ready"], memory["ready_since_s"] = ready, state.now_s
        correction.observe(
            now_s=state.now_s, dt=dt, per_replica=load.slow_rate / ready, peak=load.peak / ready,
            in_flight=load.slow_in_flight / ready, in_flight_now=in_flight / ready,
            waiting=waiting / ready, good=load.good, good_lately=load.good_lately,
            prompt_tokens=load.mean_prompt_tokens,
            output_tokens=load.mean_output_tokens, rate=rate, model=self._model,
            pressure=pressed, steady_s=state.now_s - memory["ready_since_s"], load_steady_s=load.steady_s,
            is_growing=bool(state.count("starting")),
        )  # fmt: skip
        memory["correcting"] = correction.to_memory()
        memory["is_calm"] = correction.is_calm(state.now_s, rate)

    # ---- when it changes

    def _held(self, state: FleetState, memory: dict[str, Any], within: decisions.Bounds, start_s: float) -> int:
        """The target, changed at once upwards, and downwards after `hold_s`; `why` says so."""
        now_s, current = state.now_s, decisions.asked(state, memory)
        needed, less, why = int(memory["needed"]), int(memory["less"]), memory["need_why"]
        base_s = self._settings.downscale_delay_s
        hold_s = max(LEAST_HOLD_S, start_s / 2) if base_s is None else base_s
        regrets = memory.get("regrets", 0.0)
        hold_s *= 2.0 ** math.floor(regrets)
        wanted = min(max(needed, within.minimum), within.maximum)
        if wanted > current:
            memory["lows"], memory["lows_since_s"] = (), now_s
            since_s = memory.setdefault("high_since_s", now_s)
            if now_s - since_s < self._settings.upscale_delay_s:
                memory["why"] = f"keeps {current}: {wanted} {_are(wanted)} needed since {now_s - since_s:.0f} s; {why}"
                return current
            if now_s - memory.get("down_s", -math.inf) < 2 * max(start_s, hold_s):
                memory["regrets"] = min(MOST_REGRETS, regrets + 1)
                memory["regret_s"] = now_s
                memory.pop("down_s", None)
            memory["why"] = f"{wanted} {_are(wanted)} needed: {why}"
            return wanted
        memory.pop("high_since_s", None)
        if regrets and now_s - memory.get("regret_s", now_s) > FORGIVEN_HOLDS * hold_s:
            memory["regrets"], memory["regret_s"] = max(0.0, regrets - 1), now_s
        lower = min(max(less, within.minimum), within.maximum)
        # The most that was enough at any time of the last `hold_s`: (when, number), later ones only if they are less.
        lows = [(at_s, low) for at_s, low in memory.get("lows", ()) if low > lower]
        begun_s = memory.setdefault("lows_since_s", now_s)
        lows.append((now_s, lower))
        while lows[0][0] <= now_s - hold_s:
            del lows[0]
        memory["lows"] = tuple(lows)
        most = int(lows[0][1])
        if needed == 0:  # idleness has waited already
            most, begun_s = 0, -math.inf
        is_new = base_s is None and memory["load"]["observed_s"] < WATCHED_S  # nothing is known of how it comes back
        if lower >= current or most >= current or now_s - begun_s < hold_s or (is_new and needed):
            more = f", {lower} would be if that stays so for {hold_s:.0f} s" if lower < current else ""
            memory["why"] = f"{current} {_are(current)} enough{more}: {why}"
            return current
        memory["down_s"] = now_s
        memory["why"] = f"{most} {_are(most)} enough: {why}"
        return most


def enough(load: Load, level: float, each: float, block_s: float, most: int, *, full: float, loss: float) -> int:
    """The fewest replicas, up to `most`, that take `level` requests/s, and with which no more than `loss` of them would
    be late while the load rises.
    """
    low = min(most, max(1, math.ceil(level / (full * each) - 1e-9)))
    high = most
    while low < high:
        middle = (low + high) // 2
        if load.late_share(middle * each - level, level, block_s) <= loss:
            high = middle
        else:
            low = middle + 1
    return low


def _are(count: int) -> str:
    return "is" if count == 1 else "are"
