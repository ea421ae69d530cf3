"""Gives a client that came back what the engine had given before, out of the journal."""

from collections.abc import Callable

import msgspec

from kervan.errors import EngineError
from kervan.fleet.codec import Codec, Outputs
from kervan.fleet.reconnect.journal import Attempt
from kervan.fleet.stream import Stream


async def replay(attempt: Attempt, stream: Stream, codec: Codec, give: Callable[[Outputs], None]) -> bool:
    """`give` all outputs of the attempt's journal, each when the app has taken the one before; True if that was all.

    One by one, because vLLM joins outputs that wait, and one that tells both what the client has and what it has not
    could not be cut. Raises: EngineError when another version of vLLM has written the journal.
    """
    count = 0
    for data in attempt.journal.outputs():
        try:
            outputs = codec.recorded(data, stream.request_id)
        except (msgspec.MsgspecError, ValueError) as error:
            raise EngineError(f"its journal cannot be read: {error}") from error
        (output,) = outputs.outputs
        stream.generated += output.new_token_ids
        stream.num_replayed = len(stream.generated)
        count += len(output.new_token_ids)
        give(outputs)
        if output.finish_reason is not None:
            return True
        await attempt.wait_for(count)
    return False
