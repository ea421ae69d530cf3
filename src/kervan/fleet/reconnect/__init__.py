"""Clients that come back to their stream after its connection, or its gateway, was lost (`replay_s`).

1. `gateway/reconnect.py` opens a `Journal` for a streamed request and puts its id into the answer's head.
2. `FleetClient` adds each output of the engine to the journal (`journal.py`); `store.py` says which journals stay.
3. `copy_sender.py` sends what is new to another gateway, one frame per engine step, and only then do the outputs go to
   vLLM's app. `copy_holder.py` takes such copies, and `copy_frames.py` has what the two say to each other.
4. `fleet/vllm/progress.py` tells the `Attempt` how many tokens the app has taken; that count names each event.
5. The client asks any gateway for GET /v1/streams/{id} with its last event. The one that has the journal answers, or
   when that is gone, the one with the copy, which adopts it.
6. The request goes through vLLM's app once more: the journal's outputs come first, each when the app has taken the one
   before; events up to the client's last are left out; what follows is generated as for a stream that moves.

`replicated_store.py` is all of this that one gateway holds.
"""
