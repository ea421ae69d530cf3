"""What the evacuation policy is told: a leaving replica's streams, and what their targets can take."""

import time
from collections.abc import Iterable

from kervan.fleet.link import ReplicaLink
from kervan.fleet.stream import Stream
from kervan.policy.evacuation import EvacuationState, LeavingStream, TargetReplica
from kervan.policy.output_length import LengthEstimate

# Until prompts have been seen; assumed, not measured. Too high a guess moves streams sooner than the bound on
# inter-token latency allows; too low a one leaves them at a dying replica.
DEFAULT_PREFILL_TOKENS_PER_S = 20_000.0
MIN_PROMPT_TOKENS = 256  # of shorter ones, the time to the first token is not spent on prefill
MIN_PROMPTS = 8
FADE = 0.98  # per prompt: a speed that was seen once counts less and less


class PrefillSpeed:
    """How fast replicas prefill, learned from first tokens: the fastest ones waited in no queue."""

    def __init__(self) -> None:
        self._num_prompts = 0
        self._fastest_tokens_per_s = 0.0

    def observe(self, prompt_tokens: int, ttft_s: float) -> None:
        if prompt_tokens < MIN_PROMPT_TOKENS or ttft_s <= 0:
            return
        self._num_prompts += 1
        self._fastest_tokens_per_s = max(FADE * self._fastest_tokens_per_s, prompt_tokens / ttft_s)

    @property
    def known_tokens_per_s(self) -> float | None:
        """None until enough prompts have been seen."""
        return self._fastest_tokens_per_s if self._num_prompts >= MIN_PROMPTS else None

    @property
    def tokens_per_s(self) -> float:
        return self.known_tokens_per_s or DEFAULT_PREFILL_TOKENS_PER_S


def state(
    link: ReplicaLink, targets: Iterable[ReplicaLink], *, lengths: LengthEstimate, prefill_tokens_per_s: float
) -> EvacuationState:
    """What one gateway knows. It takes its share of the targets' room and speed; the other gateways take theirs."""
    now_s = time.monotonic()
    return EvacuationState(
        streams=[_leaving(stream, lengths) for stream in link.streams.values()],
        targets=[_target(target, prefill_tokens_per_s, now_s) for target in targets],
        deadline_s=None if link.leaves_at_s is None else max(0.0, link.leaves_at_s - now_s),
        may_linger=link.may_linger,
        elapsed_s=now_s - link.leaving_since_s,
        source_s_per_token=link.pace_s(now_s),
    )


def _leaving(stream: Stream, lengths: LengthEstimate) -> LeavingStream:
    num_generated, rest = len(stream.generated), stream.remaining_output_tokens
    return LeavingStream(
        stream_id=stream.wire_id,
        context_tokens=stream.prompt_tokens + num_generated,
        max_remaining_tokens=rest,
        expected_remaining_tokens=lengths.remaining_tokens(num_generated, max_remaining_tokens=rest),
        is_movable=stream.is_movable,
        gave_token=stream.gave_token,
    )


def _target(link: ReplicaLink, prefill_tokens_per_s: float, now_s: float) -> TargetReplica:
    facts, pong = link.facts, link.pong
    share = 1 / max(1, pong.num_gateways)
    running = max(pong.running + pong.waiting, len(link.streams))
    queued = sum(s.prompt_tokens + len(s.generated) for s in link.streams.values() if not s.gave_token)
    free_kv_tokens = facts.num_gpu_blocks * facts.block_size * (1 - pong.kv_cache_usage)
    return TargetReplica(
        replica_id=link.replica_id,
        free_streams=int(share * max(0, facts.max_num_seqs - running)),
        free_kv_tokens=int(share * free_kv_tokens) - queued,
        prefill_tokens_per_s=share * prefill_tokens_per_s,
        queued_prefill_tokens=queued,
        step_s=link.pace_s(now_s) or 0.0,
        max_step_tokens=facts.max_num_batched_tokens or None,
    )
