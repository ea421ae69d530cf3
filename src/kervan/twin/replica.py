"""`python -m kervan.twin.replica FD`: a twin in a process of its own. FD is this end of the control line.

One thread does all: it takes what gateways send, and wakes when the step in progress should end. It imports neither
vLLM nor torch, so that dozens fit on a laptop.
"""

import logging
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
import zmq

from kervan import logs
from kervan.config.fault import Fault
from kervan.fleet import auth, curve, wire
from kervan.fleet.control import Command, ControlEnd, EngineFailed, EngineLoad, Ready
from kervan.fleet.sessions import Session, Sessions
from kervan.fleet.step_clock import StepClock
from kervan.twin.token_engine import TwinEngine, TwinOutput, TwinSettings, TwinStep
from kervan.twin.wire import (
    ABORT,
    ADD,
    UTILITY,
    UTILITY_ANSWERS,
    EngineStats,
    GatewayWire,
    UtilityCall,
    read_call,
    read_ids,
)

logger = logging.getLogger(__name__)

LOAD_PERIOD_S = 1.0
# A step that ends late is made up for by shorter waits; what is later than this is lost, and told.
MAX_LATE_S = 0.05
MAX_MESSAGES = 64  # taken before the step in progress is looked at again
ENGINE_VERSION = "twin"


class TwinSpec(msgspec.Struct, frozen=True):
    """The first message to a twin."""

    replica_id: str
    host: str
    secret: str
    settings: TwinSettings
    encrypts: bool = True
    secret_before: str = ""


class TwinReplica:
    """Sessions and sockets around a `TwinEngine`; `tick` does what is due and waits at most a second."""

    def __init__(self, spec: TwinSpec, report: Callable[[msgspec.Struct], None]):
        self.spec = spec
        self.engine = TwinEngine(spec.settings.timing, spec.settings.limits)
        self.is_draining = False
        self.fault = Fault("none")
        self._report = report
        self._commands: deque[Command] = deque()
        self._wires: list[GatewayWire] = []
        self._step: TwinStep | None = None
        self._step_ends_s = 0.0
        self._num_steps = 0
        self._step_clock = StepClock()
        self._num_tokens = 0
        self._crash_at: float | None = None
        self._lost_s = 0.0
        self._reported_s = time.monotonic()
        self._lost_share = 0.0
        self._told_load = (0, 0)  # running and waiting, as gateways know them
        self.sessions = Sessions(
            replica_id=spec.replica_id,
            secrets=auth.Secrets(spec.secret, spec.secret_before),
            engine_version=None,
            begin=self._begin_session,
            end=self._end_session,
        )
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        pair = curve.draw() if spec.encrypts else None
        self.public_key = pair.public.decode() if pair is not None else ""
        self._doorkeeper = curve.Doorkeeper(self._context, self.sessions.allowed_keys, spec.replica_id)
        self._input, self.address = wire.bind(self._context, spec.host, pair)
        self._output, self._output_address = wire.bind(self._context, spec.host, pair)
        for router in (self._input, self._output):
            self._doorkeeper.watch(router)
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        self._poller = zmq.Poller()
        for place in (self._input, self._output, self._wake_read, *self._doorkeeper.sockets):
            self._poller.register(place, zmq.POLLIN)

    @property
    def facts(self) -> wire.EngineFacts:
        """What it tells gateways of its engine."""
        limits = self.engine.limits
        return wire.EngineFacts(
            limits.max_model_len,
            limits.num_blocks,
            limits.block_size,
            limits.max_num_seqs,
            limits.max_num_batched_tokens,
        )

    def close(self) -> None:
        """Close its sockets; it cannot be used any more."""
        self._context.destroy(linger=0)
        os.close(self._wake_read)
        os.close(self._wake_write)

    def obey(self, command: Command) -> None:
        """Hand over a command, from any thread."""
        self._commands.append(command)
        os.write(self._wake_write, b"!")

    # ---- one round

    def tick(self) -> None:
        """Wait for something to do, at most a second, and do it."""
        now_s = time.monotonic()
        if self._step is None:
            self._start_step(now_s)
        due_s = self._reported_s + LOAD_PERIOD_S
        if self._step is not None:
            due_s = min(due_s, self._step_ends_s)
        wait_s = max(0.0, due_s - now_s)
        ready = dict(self._poller.poll(int(wait_s * 1000)))
        if not ready and self._step is not None:  # the poller counts whole milliseconds
            time.sleep(max(0.0, min(due_s - time.monotonic(), 1e-3)))
        if self._wake_read in ready:
            os.read(self._wake_read, 4096)
            while self._commands:
                self._obey(self._commands.popleft())
        if not ready.keys().isdisjoint(self._doorkeeper.sockets):
            self._doorkeeper.look()
        if self._output in ready:
            identity, *_ = self._output.recv_multipart()
            self._output.send_multipart([identity, wire.SUBSCRIBED])
        if self._input in ready:
            self._take_messages()
        now_s = time.monotonic()
        if self._step is not None and now_s >= self._step_ends_s:
            self._end_step(now_s)
        if now_s - self._reported_s >= LOAD_PERIOD_S:
            self._report_load(now_s)
            self.sessions.end_expired()

    def _start_step(self, now_s: float) -> None:
        if self.fault.kind == "hang" or not self.engine.has_work:
            return
        self._step = self.engine.start_step(now_s)
        if self._step is None:
            return
        self._step_clock.tokens_begin(self._step.prefill_tokens + self._step.sequences)
        slowness = self.fault.amount if self.fault.kind == "slow" else 1.0
        late_s = max(0.0, now_s - self._step_ends_s) if self._step_ends_s else 0.0
        self._lost_s += max(0.0, late_s - MAX_LATE_S)
        begin_s = now_s - min(late_s, MAX_LATE_S)
        self._step_ends_s = begin_s + self._step.duration_s * slowness / self.spec.settings.speed

    def _end_step(self, now_s: float) -> None:
        assert self._step is not None
        outputs = self.engine.end_step(self._step)
        self._step = None
        self._num_steps += 1
        self._step_clock.tokens_end()
        self._step_clock.stepped()
        self._num_tokens += len(outputs)
        by_client: dict[int, list[TwinOutput]] = {}
        for output in outputs:
            by_client.setdefault(output.client, []).append(output)
        stats = self._new_stats() if outputs else None
        for client, own in by_client.items():
            self._send(client, self._wires[client].outputs(own, now_s, stats))
            stats = None  # they are counters: one gateway counts them, as with vLLM
        if self._crash_at is not None and self._num_tokens >= self._crash_at:
            logger.error("crashes after %d tokens, as requested", self._num_tokens)
            os.kill(os.getpid(), signal.SIGKILL)
        if not self.engine.has_work:
            self._step_ends_s = 0.0

    def _send(self, client: int, message: bytes) -> None:
        session = self.sessions.all[client]
        if not session.is_over:
            number = wire.encode_number(session.num_outputs + 1)
            self._output.send_multipart([session.identity, number, message])
            session.num_outputs += 1

    def _new_stats(self) -> EngineStats | None:
        """What is to be told of this step; None when nothing has changed but the share of the pool in use."""
        prefix_cache, load = self.engine.new_prefix_counts(), self._load
        if not prefix_cache.requests and load[:2] == self._told_load:
            return None
        self._told_load = load[:2]
        return EngineStats(*load, prefix_cache)

    @property
    def _load(self) -> tuple[int, int, float]:
        engine = self.engine
        return engine.num_running, engine.num_waiting, round(engine.kv_cache_usage, 4)

    def _report_load(self, now_s: float) -> None:
        self._lost_share = self._lost_s / (now_s - self._reported_s)
        self._lost_s, self._reported_s = 0.0, now_s
        notes = []
        if self._lost_share > 0.05:
            notes.append(f"this machine is too slow for it: {100 * self._lost_share:.0f}% of its time is lost")
        if self.fault.kind != "none":
            notes.append(f"injected fault: {self.fault.kind} {self.fault.amount:g}")
        self._report(
            EngineLoad(
                *self._load,
                self._num_steps,
                self.engine.has_work,
                "; ".join(notes),
                expected_step_s=self._step_clock.expected_s(is_guessed=True),
                num_suspects=self.sessions.num_suspects,
            )
        )

    # ---- what others want

    def _obey(self, command: Command) -> None:
        if command.command == "drain":
            self.is_draining = True
            for session in self.sessions.live:
                self._input.send_multipart([session.identity, wire.PONG, self._pong(session)])
        elif command.fault is not None:
            self.fault = command.fault
            logger.warning("injected fault: %s %g", self.fault.kind, self.fault.amount)
            self.engine.reserve(self.fault.amount if self.fault.kind == "kv-pressure" else 0.0)
            self._crash_at = self._num_tokens + self.fault.amount if self.fault.kind == "crash" else None

    def _take_messages(self) -> None:
        for _ in range(MAX_MESSAGES):
            try:
                identity, kind, *frames = self._input.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if kind == wire.HELLO:
                self._input.send_multipart([identity, *self.sessions.greet(identity, frames[0])])
                continue
            client = self.sessions.seen(identity)
            if client is None:
                self._input.send_multipart(self.sessions.refuse(identity))
                continue
            if kind == wire.PING:
                self.sessions.ping(client, frames[0])
                self._input.send_multipart([identity, wire.PONG, self._pong(self.sessions.all[client])])
            elif kind == ADD:
                self._step_clock.work_comes(has_work=self.engine.has_work)
                self.engine.add(self._wires[client].read_request(frames[0], client), time.monotonic())
            elif kind == ABORT:
                self.engine.abort(read_ids(frames[0]))
            elif kind == UTILITY:
                call = read_call(frames[0])
                self._send(client, self._wires[client].answer(call, self._answer(call), time.monotonic()))

    def _answer(self, call: UtilityCall) -> Any:
        if call.method == "reset_prefix_cache":
            return self.engine.reset_prefix_cache(preempts=bool(call.args and call.args[0]))
        return UTILITY_ANSWERS.get(call.method)

    def _begin_session(self, index: int) -> tuple[str, wire.EngineFacts]:
        self._wires.append(GatewayWire(self.sessions.all[index].hello.layouts))
        return self._output_address, self.facts

    def _end_session(self, index: int) -> int:
        abandoned = self.engine.clients_of(index)
        self.engine.abort(abandoned)
        return len(abandoned)

    def _pong(self, session: Session) -> bytes:
        return self.sessions.pong(
            session, self._load, is_draining=self.is_draining, has_work=self.engine.has_work, clock=self._step_clock
        )


def main() -> None:
    """`python -m kervan.twin.replica FD`: a twin, driven over the control line on FD. Ends with the other end of it.

    Exits with status 1, and the reason over the line, when the spec is malformed or a port cannot be bound.
    """
    logs.configure(level=logging.INFO)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = ControlEnd(socket.socket(fileno=int(sys.argv[1])))
    try:
        spec = msgspec.json.decode(control.receive(), type=TwinSpec)
        logs.configure(level=logging.INFO, force=True, replica=spec.replica_id)
        twin = TwinReplica(spec, control.send)
    except (msgspec.MsgspecError, zmq.ZMQError) as error:
        control.send(EngineFailed("EngineError", f"the twin did not start: {error}"))
        sys.exit(1)

    def on_command(line: bytes) -> None:
        command = msgspec.json.decode(line, type=Command)
        if command.command == "stop":
            os._exit(0)
        twin.obey(command)

    control.follow(on_command, lambda: os._exit(0))
    time.sleep(spec.settings.start_s)
    control.send(Ready(twin.address, twin.facts, ENGINE_VERSION, public_key=twin.public_key))
    while True:
        twin.tick()


if __name__ == "__main__":
    main()
