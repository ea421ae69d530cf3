from typing import Any

import msgspec
import pytest
import zmq

from kervan.fleet import auth, wire

WELCOME_FACTS = wire.EngineFacts(max_model_len=4096, num_gpu_blocks=100, block_size=16, max_num_seqs=64)


SESSION = b"0123456789abcdef"


def hello(secret: str = "s3cret", **changes: object) -> wire.Hello:
    """Of gateway g1 to replica r1."""
    proof = auth.link_proof(secret, session=SESSION, gateway_id="g1", replica_id="r1")
    return msgspec.structs.replace(wire.Hello(wire.PROTOCOL, "0.32.0", "g1", proof), **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        pytest.param({}, None, id="welcome"),
        pytest.param({"gateway_id": "another"}, ["belongs to another fleet"], id="another gateway's proof"),
        pytest.param({"secret": "guess"}, ["belongs to another fleet"], id="wrong secret"),
        pytest.param({"secret": ""}, ["belongs to another fleet"], id="no secret"),
        pytest.param({"proof": b""}, ["belongs to another fleet"], id="no proof"),
        pytest.param(
            {"proof": b"", "protocol": 3}, ["protocol 3", "install one kervan version"], id="before there were proofs"
        ),
        pytest.param(
            {"protocol": wire.PROTOCOL + 1},
            [f"protocol {wire.PROTOCOL + 1}, replica {wire.PROTOCOL}", "install one kervan version"],
            id="other protocol",
        ),
        pytest.param(
            {"engine_version": "0.24.0"},
            ["gateway runs vLLM 0.24.0, replica vLLM 0.32.0", "install the same on all nodes"],
            id="other vLLM",
        ),
        pytest.param(
            {"secret": "guess", "engine_version": "0.24.0"}, ["another fleet"], id="strangers learn no version"
        ),
    ],
)
def test_refusals(changes: dict[str, Any], words: list[str] | None) -> None:
    refusal = wire.refusal(
        hello(**changes), session=SESSION, replica_id="r1", engine_version="0.32.0", secrets=("s3cret",)
    )
    if words is None:
        assert refusal is None
        return
    assert refusal is not None
    assert all(word in refusal for word in words)
    assert "s3cret" not in refusal


@pytest.mark.parametrize(
    "message",
    [
        hello(),
        wire.Welcome("r1", "0.32.0", "tcp://h:2", 12.5, WELCOME_FACTS),
        wire.Ping(17),
        wire.Pong(3, 2, 0.25, 1000, True),
    ],
    ids=lambda message: type(message).__name__,
)
def test_messages_survive_the_wire(message: msgspec.Struct) -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=type(message)) == message


def test_queues_are_unbounded_because_a_router_drops_silently_at_its_limit() -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router, context.socket(zmq.DEALER) as dealer:
        wire.configure(router)
        wire.configure(dealer)
        dealer.setsockopt(zmq.IDENTITY, b"gateway")
        port = router.bind_to_random_port("tcp://127.0.0.1")
        dealer.connect(f"tcp://127.0.0.1:{port}")
        dealer.send(wire.HELLO)
        assert router.poll(10_000)
        router.recv_multipart()
        num_messages = 5000  # zmq's own limit is 1,000 on each side
        for i in range(num_messages):
            router.send_multipart([b"gateway", b"%d" % i])
        for i in range(num_messages):
            assert dealer.poll(10_000)
            assert dealer.recv() == b"%d" % i


def test_the_words_cannot_be_taken_for_vllms_one_byte_kinds() -> None:
    words = [wire.HELLO, wire.WELCOME, wire.REFUSED, wire.PING, wire.PONG, wire.SUBSCRIBE, wire.SUBSCRIBED]
    assert len({*words, wire.ENGINE_DEAD}) == len(words) + 1
    assert all(len(word) > 1 for word in words)
