"""The process of one engine replica: vLLM's engine core, its two socket threads replaced by ours.

Stock vLLM connects its core to a fixed list of frontends at start; this one binds, so that any number of gateways
come and go. A gateway's session becomes vLLM's `client_index`, so the core itself emits one message per engine step
per gateway. No hop or process is added: gateways talk to the core's own IO threads.
"""

import contextlib
import functools
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any, NoReturn

import msgspec
import zmq
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest, EngineCoreRequestType
from vllm.v1.engine.core import EngineCoreProc, EngineShutdownState
from vllm.v1.engine.utils import EngineZmqAddresses
from vllm.v1.executor import Executor
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from kervan import logs
from kervan.config.profile import ProfileAsk
from kervan.errors import EngineError
from kervan.fleet import auth, curve, stream_ids, wire
from kervan.fleet.control import Command, ControlEnd, EngineFailed, EngineLoad, EngineSpec, Ready
from kervan.fleet.process_group import end_group
from kervan.fleet.sessions import Session, Sessions
from kervan.fleet.step_clock import StepClock
from kervan.fleet.vllm import (
    failures,
    gpu_memory,
    head_start,
    profiling,
    resume,
    runner_v1,
    stack_dumps,
    versions,
    warm_process,
)

logger = logging.getLogger(__name__)

CANARY_INDEX = -2  # vLLM uses -1 for its data-parallel coordinator
PROFILE_INDEX = -3  # nobody hears what a profile's calls return
CANARY_TOKENS = 2
CANARY_TIMEOUT_S = 600.0  # the first step may still compile kernels
LOAD_PERIOD_S = 1.0
POLL_MS = 100


def executor_class(vllm_config: VllmConfig, spec: EngineSpec) -> Any:
    """vLLM's class: of worker processes of this node, or of Ray actors on several."""
    if spec.placement is None:
        return Executor.get_class(vllm_config)
    from kervan.fleet.vllm.stages import StagesExecutor

    return StagesExecutor


@dataclass(frozen=True, slots=True)
class _Subscribe:
    """Tells the output thread to wait for a session's SUBSCRIBE."""

    identity: bytes


class FleetEngineCore(EngineCoreProc):  # type: ignore[misc]
    """vLLM's engine core behind two bound ROUTER sockets."""

    def __init__(self, vllm_config: VllmConfig, spec: EngineSpec):
        self.spec = spec
        self.sessions = Sessions(
            replica_id=spec.replica_id,
            secrets=auth.Secrets(spec.secret, spec.secret_before),
            engine_version=versions.engine_version(),
            begin=self._begin_session,
            end=self._end_session,
        )
        self.is_draining = False
        self.num_steps = 0
        self.step_clock = StepClock()
        self.load = (0, 0, 0.0)
        self.canary_outputs: queue.Queue[EngineCoreOutputs] = queue.Queue()
        self.address = ""
        self.output_address = ""
        self.key_pair = curve.draw() if spec.encrypts else None
        self._context: zmq.Context[zmq.Socket[bytes]]  # the input thread makes both: vLLM's workers are forked before
        self._doorkeeper: curve.Doorkeeper
        self._has_doorkeeper = threading.Event()
        self._output_bound = threading.Event()
        self._profile: profiling.StepProfile | None = None
        super().__init__(
            vllm_config=vllm_config,
            local_client=True,
            handshake_address="",
            executor_class=executor_class(vllm_config, spec),
            log_stats=True,
            engine_index=0,
        )
        self.model_executor.collective_rpc(runner_v1.install)
        if vllm_config.parallel_config.world_size > 1 and spec.placement is None:
            self.model_executor.collective_rpc(stack_dumps.install, args=(spec.stacks_dir,))
        self._time_steps(self.scheduler)

    def _time_steps(self, scheduler: Any) -> None:
        """Tell the step clock what each step computes, whichever class the scheduler is of."""
        schedule, update = scheduler.schedule, scheduler.update_from_output

        @functools.wraps(schedule)
        def timed_schedule(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            if output.total_num_scheduled_tokens:
                self.step_clock.tokens_begin(output.total_num_scheduled_tokens)
            return output

        @functools.wraps(update)
        def timed_update(output: Any, *args: Any, **kwargs: Any) -> Any:
            if output.total_num_scheduled_tokens:
                self.step_clock.tokens_end()
            return update(output, *args, **kwargs)

        scheduler.schedule, scheduler.update_from_output = timed_schedule, timed_update

    @contextlib.contextmanager
    def _perform_handshakes(self, *_args: Any, **_kwargs: Any) -> Iterator[EngineZmqAddresses]:
        yield EngineZmqAddresses(inputs=[""], outputs=[""])

    def _process_engine_step(self) -> bool:
        executed = super()._process_engine_step()
        self.num_steps += 1
        self.step_clock.stepped()
        return bool(executed)

    @property
    def _is_busy(self) -> bool:
        return self.has_work() or not self.input_queue.empty()

    @property
    def facts(self) -> wire.EngineFacts:
        """What WELCOME tells gateways of this engine: its limits, and its KV cache in blocks."""
        config = self.vllm_config
        return wire.EngineFacts(
            max_model_len=config.model_config.max_model_len,
            num_gpu_blocks=config.cache_config.num_gpu_blocks or 0,
            block_size=config.cache_config.block_size or 0,
            max_num_seqs=config.scheduler_config.max_num_seqs,
            max_num_batched_tokens=config.scheduler_config.max_num_batched_tokens,
            entry_limits=versions.runner_limits() if config.use_v2_model_runner else {},
        )

    # ---- input thread

    def process_input_sockets(
        self, input_addresses: Any, coord_input_address: Any, identity: bytes, ready_event: threading.Event
    ) -> None:
        add_decoder = MsgpackDecoder(EngineCoreRequest)
        decoder = MsgpackDecoder()
        # One context for both threads, as the doorkeeper answers for one; with a thread for each socket, to encrypt.
        self._context = zmq.Context(io_threads=2)
        self._doorkeeper = curve.Doorkeeper(self._context, self.sessions.allowed_keys, self.spec.replica_id)
        self._has_doorkeeper.set()
        router, self.address = wire.bind(self._context, self.spec.host, self.key_pair)
        ready_event.set()
        self._doorkeeper.watch(router)
        self._output_bound.wait()  # and the doorkeeper watches that socket too
        poller = zmq.Poller()
        for socket in (router, *self._doorkeeper.sockets):
            poller.register(socket, zmq.POLLIN)
        was_draining = False
        lease_check_s = time.monotonic()
        while True:
            readable = dict(poller.poll(POLL_MS))
            if not readable.keys().isdisjoint(self._doorkeeper.sockets):
                self._doorkeeper.look()
            if router in readable:
                session_identity, kind, *frames = router.recv_multipart(copy=False)
                self._handle(router, session_identity.bytes, kind.bytes, frames, add_decoder, decoder)
            if self.is_draining and not was_draining:
                was_draining = True
                for session in self.sessions.live:
                    router.send_multipart([session.identity, wire.PONG, self._pong(session)])
            if (now_s := time.monotonic()) - lease_check_s > 1.0:
                lease_check_s = now_s
                self.sessions.end_expired()

    def _handle(
        self,
        router: zmq.Socket[bytes],
        identity: bytes,
        kind: bytes,
        frames: list[Any],
        add_decoder: MsgpackDecoder,
        decoder: MsgpackDecoder,
    ) -> None:
        if kind == wire.HELLO:
            router.send_multipart([identity, *self.sessions.greet(identity, frames[0].bytes)])
            return
        index = self.sessions.seen(identity)
        if index is None:
            router.send_multipart(self.sessions.refuse(identity))
            return
        if kind == wire.PING:
            self.sessions.ping(index, frames[0].bytes)
            router.send_multipart([identity, wire.PONG, self._pong(self.sessions.all[index])])
            return
        request_type = EngineCoreRequestType(kind)
        if request_type == EngineCoreRequestType.ADD:
            request = add_decoder.decode(frames)
            request.client_index = index
            with logs.about(functools.partial(stream_ids.ids, request.request_id, request.trace_headers)):
                try:
                    prepared = self.preprocess_add_request(request)
                    max_model_len = self.vllm_config.model_config.max_model_len
                    resume.restore(prepared[0], self.structured_output_manager, max_model_len)
                except Exception:  # noqa: BLE001 - vLLM's own boundary: what one request raises ends that request only
                    self._handle_request_preproc_error(request)
                    return
            if prepared[0].is_finished():
                self.output_queue.put_nowait((index, resume.ending(prepared[0])))
                return
            self.step_clock.work_comes(has_work=self._is_busy)
            self.input_queue.put_nowait((request_type, prepared))
            return
        message = decoder.decode(frames)
        if request_type == EngineCoreRequestType.UTILITY:
            message = (index, *message[1:])
        elif request_type == EngineCoreRequestType.ABORT:
            self.aborts_queue.put_nowait(message)
        self.input_queue.put_nowait((request_type, message))

    def _begin_session(self, index: int) -> tuple[str, wire.EngineFacts]:
        self.output_queue.put_nowait(_Subscribe(self.sessions.all[index].identity))
        self._output_bound.wait()
        return self.output_address, self.facts

    def _pong(self, session: Session) -> bytes:
        return self.sessions.pong(
            session, self.load, is_draining=self.is_draining, has_work=self._is_busy, clock=self.step_clock
        )

    def _end_session(self, index: int) -> int:
        abandoned = [r.request_id for r in list(self.scheduler.requests.values()) if r.client_index == index]
        if abandoned:
            self.aborts_queue.put_nowait(abandoned)
            self.input_queue.put_nowait((EngineCoreRequestType.ABORT, abandoned))
        return len(abandoned)

    # ---- output thread

    def process_output_sockets(self, output_paths: Any, coord_output_path: Any, engine_index: int) -> None:
        encoder = MsgpackEncoder()
        self._has_doorkeeper.wait()
        router, self.output_address = wire.bind(self._context, self.spec.host, self.key_pair)
        self._doorkeeper.watch(router)
        self._output_bound.set()
        subscribed: set[bytes] = set()
        while True:
            item = self.output_queue.get()
            if isinstance(item, _Subscribe):
                self._await_subscription(router, item.identity, subscribed)
                continue
            if item == EngineCoreProc.ENGINE_CORE_DEAD:
                for session in self.sessions.live:
                    router.send_multipart([session.identity, item])
                time.sleep(0.3)  # linger is 0: let the words leave before the process does
                return
            index, outputs = item
            if (stats := outputs.scheduler_stats) is not None:
                self.load = (stats.num_running_reqs, stats.num_waiting_reqs, stats.kv_cache_usage)
            if index == CANARY_INDEX:
                self.canary_outputs.put(outputs)
            elif 0 <= index < len(self.sessions.all) and not (session := self.sessions.all[index]).is_over:
                number = wire.encode_number(session.num_outputs + 1)
                router.send_multipart([session.identity, number, *encoder.encode(outputs)], copy=False)
                session.num_outputs += 1  # after sending: PONG must not promise what is still to be sent

    @staticmethod
    def _await_subscription(router: zmq.Socket[bytes], identity: bytes, subscribed: set[bytes]) -> None:
        """A gateway subscribes as soon as it has WELCOME; others' outputs wait that millisecond."""
        deadline_s = time.monotonic() + 2.0
        while identity not in subscribed and time.monotonic() < deadline_s:
            if router.poll(POLL_MS):
                sender, *_ = router.recv_multipart()
                subscribed.add(sender)
                router.send_multipart([sender, wire.SUBSCRIBED])

    # ---- readiness

    def run_canary(self) -> None:
        """Make the engine produce a token; it joins routing only after this.

        Raises: EngineError when no token comes. Needs the busy loop to run in another thread.
        """
        is_pooling = self.vllm_config.model_config.runner_type == "pooling"
        tasks = self.get_supported_tasks()
        pooling_task = next((t for t in ("embed", "classify", "token_embed", "token_classify") if t in tasks), None)
        request = EngineCoreRequest(
            request_id="kervan-canary",
            prompt_token_ids=[1] * 4,
            mm_features=None,
            sampling_params=None
            if is_pooling
            else SamplingParams(max_tokens=CANARY_TOKENS, temperature=0.0, ignore_eos=True),
            pooling_params=PoolingParams(task=pooling_task) if is_pooling else None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt="kervan-canary",
            data_parallel_rank=None,
            client_index=CANARY_INDEX,
        )
        self.input_queue.put_nowait((EngineCoreRequestType.ADD, self.preprocess_add_request(request)))
        deadline_s = time.monotonic() + CANARY_TIMEOUT_S
        while time.monotonic() < deadline_s:
            try:
                outputs = self.canary_outputs.get(timeout=deadline_s - time.monotonic())
            except queue.Empty:
                break
            for output in outputs.outputs:
                if output.finish_reason is not None:
                    if is_pooling or output.new_token_ids:
                        return
                    raise EngineError(f"the canary request ended without a token ({output.finish_reason})")
        raise EngineError(f"the engine gave no canary token within {CANARY_TIMEOUT_S:.0f} s")

    # ---- profiles

    def ask_profile(self, ask: ProfileAsk) -> None:
        """Begin a profile soon, or tell who asks that one runs. May be called from any thread; returns at once."""
        self.step_clock.hold(profiling.STANDSTILL_S)
        begin = threading.Timer(
            profiling.NOTICE_S, self._call_in_loop, args=("begin_profile", msgspec.json.encode(ask))
        )
        begin.daemon = True
        begin.start()

    def _call_in_loop(self, method: str, *args: bytes) -> None:
        """Have the thread that steps call a method: only it may talk to the workers."""
        self.input_queue.put_nowait((EngineCoreRequestType.UTILITY, (PROFILE_INDEX, 0, method, args)))

    def begin_profile(self, ask_json: bytes) -> None:
        """Called by `ask_profile`, through vLLM's loop."""
        ask = msgspec.json.decode(ask_json, type=ProfileAsk)
        if self._profile is not None and not self._profile.is_over:
            profiling.refuse(ask, "another profile of this replica runs; try again when it has ended")
            return
        self._profile = profiling.StepProfile(self, ask, self.step_clock, lambda: self._call_in_loop("end_profile"))
        try:
            self._profile.begin()
        except Exception as error:
            self._profile = None
            self.step_clock.hold(0.0)
            profiling.refuse(ask, f"it could not begin: {error}")
            raise

    def end_profile(self) -> None:
        """Called when a profile's time is over, through vLLM's loop."""
        if self._profile is not None:
            self._profile.end()

    def request_stop(self) -> None:
        """Ask vLLM's loop to shut down, and wake it up. May be called from any thread; returns at once."""
        self.shutdown_state = EngineShutdownState.REQUESTED
        self.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))


def _report_load(core: FleetEngineCore, control: ControlEnd) -> None:
    while True:
        running, waiting, kv_cache_usage = core.load
        try:
            control.send(
                EngineLoad(
                    running,
                    waiting,
                    kv_cache_usage,
                    core.num_steps,
                    core.has_work(),
                    expected_step_s=core.step_clock.expected_s(is_guessed=True),
                    num_suspects=core.sessions.num_suspects,
                )
            )
        except OSError:
            return
        time.sleep(LOAD_PERIOD_S)


def _end_process_group() -> None:
    """End this process and vLLM's workers at once; the process leads its own group."""
    end_group(os.getpgrp())


class _Phases:
    """Seconds of the phases of an engine's start, from when it was wanted."""

    def __init__(self, asked_s: float) -> None:
        self.seconds = {"imports": time.time() - asked_s}
        self._since_s = time.monotonic()

    def end(self, name: str) -> None:
        now_s = time.monotonic()
        self.seconds[name] = now_s - self._since_s
        self._since_s = now_s


def _announce(core: FleetEngineCore, control: ControlEnd, phases: _Phases, imported: Set[str]) -> None:
    try:
        core.run_canary()
    except EngineError as error:
        control.send(EngineFailed("EngineError", str(error)))
        return
    threading.Thread(target=_report_load, args=(core, control), daemon=True, name="load").start()
    phases.end("canary")
    if imported:
        warm_process.tell_imports(imported)
    public_key = core.key_pair.public.decode() if core.key_pair is not None else ""
    control.send(Ready(core.address, core.facts, versions.engine_version(), phases.seconds, public_key))


def run(
    control: ControlEnd, spec: EngineSpec, ahead: "subprocess.Popen[bytes] | None", asked_s: float, is_forked: bool
) -> int:
    """Serve until told to stop; the exit status."""
    phases = _Phases(asked_s)
    imported = frozenset(sys.modules) if is_forked else frozenset()
    core: FleetEngineCore | None = None

    def on_command(line: bytes) -> None:
        command = msgspec.json.decode(line, type=Command)
        if core is None:
            if command.command == "stop":
                _end_process_group()
        elif command.command == "drain":
            core.is_draining = True
        elif command.command == "profile":
            assert command.profile is not None
            core.ask_profile(command.profile)
        else:
            core.request_stop()

    control.follow(on_command, _end_process_group)
    try:
        head_start.wait_for_class(ahead, spec.engine_argv)
        # Gateways start no workers and read "mp" here; the last word wins in vLLM's parser.
        argv = [*spec.engine_argv, *(["--distributed-executor-backend", "ray"] if spec.placement is not None else [])]
        args = AsyncEngineArgs.from_cli_args(versions.parse_args(argv))
        vllm_config = args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
        if spec.placement is not None:
            from kervan.fleet.vllm import stages  # and Ray with it

            stages.join(spec.placement, vllm_config)
        if is_forked:
            warm_process.fork_workers()
        phases.end("config")
        with gpu_memory.taking(vllm_config, is_shared=spec.shares_gpu, is_here=spec.placement is None):
            core = FleetEngineCore(vllm_config, spec)
        phases.end("engine")
    except BaseException as error:  # whatever stops the start is reported, in one line, to the starter
        logger.exception("engine start failed")
        explained = failures.explain(error)
        control.send(EngineFailed(failures.kind(explained), str(explained)))
        return 1
    threading.Thread(target=_announce, args=(core, control, phases, imported), daemon=True, name="canary").start()
    try:
        core.run_busy_loop()
    except SystemExit:
        return 0
    except BaseException as error:
        logger.exception("engine died")
        with contextlib.suppress(OSError):
            explained = failures.explain(error)
            control.send(EngineFailed(failures.kind(explained), str(explained)))
        core._send_engine_dead()
        return 1
    finally:
        core.shutdown()
    return 0


def serve(
    control: ControlEnd,
    spec: EngineSpec,
    ahead: "subprocess.Popen[bytes] | None",
    *,
    asked_s: float,
    is_forked: bool = False,
) -> NoReturn:
    """Be the engine that `spec` asks for until the end of this process.

    `ahead`: of `head_start`; `asked_s`: `time.time()` when the engine was wanted; `is_forked`: from `warm_process`.
    """
    status = run(control, spec, ahead, asked_s, is_forked)
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        _end_process_group()
    os._exit(0)
