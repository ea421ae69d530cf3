"""What the fleet client needs to know of an engine's messages."""

from collections.abc import Sequence
from typing import Any, Protocol

from kervan.fleet.stream import Stream
from kervan.policy.prefix import PromptContent


class StreamOutput(Protocol):
    """One stream's part of an engine step."""

    request_id: str
    new_token_ids: list[int]
    finish_reason: Any


class Outputs(Protocol):
    """What an engine step gave for one gateway."""

    outputs: list[Any]
    scheduler_stats: Any
    utility_output: Any
    timestamp: float


class Codec(Protocol):
    """Turns an engine's requests and outputs into frames and back."""

    engine_version: str
    layouts: dict[str, list[str]]  # of `wire.Hello`

    def describe(self, request: Any) -> Stream:
        """A new stream for `request`, placed nowhere yet."""

    def prompt(self, stream: Stream) -> PromptContent | None:
        """What decides which blocks of the prefix cache are its prompt's; None for a prompt that is not all tokens, or
        that is computed in full whatever the cache has."""

    def cached_tokens(self, output: Any) -> int | None:
        """By a stream's first output from a replica, what the prefix cache there had, in tokens; None if not told."""

    def queue_s(self, output: Any) -> float | None:
        """By a stream's first output from a replica, how long it waited in the engine's queue; None if not told."""

    def encode_add(self, stream: Stream) -> Sequence[Any]:
        """Frames that place `stream` under its wire id, resuming after its generated tokens."""

    def encode_abort(self, wire_ids: list[str]) -> Sequence[Any]:
        """Frames that end these streams at the replica that they are sent to."""

    def encode_utility(self, call_id: int, method: str, args: tuple[Any, ...]) -> Sequence[Any]:
        """Frames that call a method of the engine; its answer carries `call_id`."""

    def decode(self, frames: Sequence[Any]) -> Outputs:
        """What an engine step gave, or the answer to a call."""

    def restore(self, output: Any, stream: Stream) -> None:
        """Give a moved stream's output the id, and only the statistics, that its client expects."""

    def finish(self, output: Any, stream: Stream) -> None:
        """Give the last output of a stream what its client's trace needs, if its replica left that out."""

    def failure(self, request_id: str) -> Outputs:
        """An output that ends `request_id` with an error."""

    def record(self, output: Any) -> bytes:
        """An output for the journal of its stream, less what names the stream."""

    def recorded(self, data: bytes, request_id: str) -> Outputs:
        """What `record` has given, as if it came from an engine now."""
