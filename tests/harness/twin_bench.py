"""Processes of engines, mostly twins, and a fleet client beside them, without Ray and HTTP."""

import asyncio
import time
from pathlib import Path
from typing import Any

from harness.live import until
from kervan.fleet.client import FleetClient
from kervan.fleet.link import Member
from kervan.fleet.process import TWIN_ENGINE, EngineProcess
from kervan.twin.replica import TwinSpec
from kervan.twin.token_engine import StepTiming, TwinLimits, TwinSettings

SECRET = "s3cret"
LIMITS = TwinLimits(num_blocks=1000, max_num_seqs=64, max_num_batched_tokens=512, max_model_len=4096, last_token=899)
FAST = StepTiming(base_s=1e-3, prefill_token_s=1e-6, sequence_s=0.0, context_token_s=0.0)


def member(name: str, engine: EngineProcess) -> Member:
    """A ready engine, as a client is told of it."""
    assert engine.ready is not None
    return Member(name, engine.ready.address, engine.ready.public_key)


class TwinBench:
    """Twins in processes, and a fleet client as a gateway has it."""

    def __init__(self, directory: Path, *, encrypts: bool = True) -> None:
        from kervan.fleet.vllm.codec import VllmCodec

        self.directory = directory
        self.encrypts = encrypts
        self.twins: dict[str, EngineProcess] = {}
        self.client = FleetClient(VllmCodec(), secret=SECRET, encrypts=encrypts)
        self.outputs: dict[str, list[Any]] = {}
        self.stats: list[Any] = []  # vLLM's SchedulerStats
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        while True:
            outputs = await self.client.outputs.get()
            if outputs.scheduler_stats is not None:
                self.stats.append(outputs.scheduler_stats)
            for output in outputs.outputs:
                self.outputs.setdefault(output.request_id, []).append(output)

    async def start(self, name: str, timing: StepTiming = FAST, limits: TwinLimits = LIMITS) -> EngineProcess:
        spec = TwinSpec(name, "127.0.0.1", SECRET, TwinSettings(timing, limits), self.encrypts)
        twin = EngineProcess(spec, log_path=self.directory / f"{name}.log", module=TWIN_ENGINE)
        await self.join(name, twin)
        return twin

    async def join(self, name: str, engine: EngineProcess) -> None:
        """Returns when it is ready and linked."""
        self.twins[name] = engine
        await until(lambda: engine.ready or engine.failure)
        assert engine.failure is None, engine.failure
        self.follow()
        await self.is_linked(name)

    async def is_linked(self, name: str) -> None:
        await until(lambda: any(link.replica_id == name for link in self.client.links))

    def follow(self) -> None:
        live = {name: twin for name, twin in self.twins.items() if not twin.ended.is_set()}
        self.client.set_members(member(name, twin) for name, twin in live.items() if twin.ready)

    async def add(
        self,
        request_id: str,
        prompt: list[int],
        max_tokens: int | None = 20,
        *,
        salt: str | None = None,
        **sampling: Any,
    ) -> None:
        from vllm.sampling_params import SamplingParams
        from vllm.v1.engine import EngineCoreRequest

        await self.client.add(
            EngineCoreRequest(
                request_id=request_id,
                prompt_token_ids=prompt,
                mm_features=None,
                sampling_params=SamplingParams(max_tokens=max_tokens, **({"ignore_eos": True} | sampling)),
                pooling_params=None,
                arrival_time=time.time(),
                lora_request=None,
                cache_salt=salt,
                data_parallel_rank=None,
            )
        )

    def tokens(self, request_id: str) -> list[int]:
        return [token for output in self.outputs.get(request_id, ()) for token in output.new_token_ids]

    def is_over(self, request_id: str) -> bool:
        return bool(self.outputs.get(request_id)) and self.outputs[request_id][-1].finish_reason is not None

    async def ended(self, *request_ids: str) -> None:
        await until(lambda: all(self.is_over(i) for i in request_ids), f"{request_ids} did not all end")

    async def close(self) -> None:
        self._reader.cancel()
        await self.client.close()
        for twin in self.twins.values():
            twin.kill()
