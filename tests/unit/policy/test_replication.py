"""Which gateway keeps the copies of another's journals."""

from hypothesis import given
from hypothesis import strategies as st

from kervan.policy.replication import Peer, decide

A, B, C = (Peer(f"gw-{name}", node, f"{node}:1") for name, node in (("a", "n1"), ("b", "n1"), ("c", "n2")))


def choose(own: Peer, *peers: Peer, current: Peer | None = None, failed: tuple[str, ...] = ()) -> Peer | None:
    return decide(own_id=own.gateway_id, own_node=own.node, peers=peers, current=current, failed=failed).peer


def test_a_gateway_alone_has_none() -> None:
    assert choose(A) is None
    assert choose(A, A) is None


def test_another_node_is_better() -> None:
    assert choose(A, A, B, C) == C
    assert choose(A, A, B) == B
    assert "as there is none on another" in decide(own_id="gw-a", own_node="n1", peers=[A, B], current=None).reason


def test_the_one_that_has_the_copies_stays() -> None:
    assert choose(A, A, B, C, current=B) == B
    assert choose(A, A, C, current=B) == C  # it is no longer listed
    moved = Peer(B.gateway_id, B.node, "n1:2")  # a new process under the old name has no copies
    assert choose(A, A, moved, C, current=B) == C


def test_one_that_does_not_answer_is_passed_over_if_there_is_another() -> None:
    assert choose(A, B, C, current=C, failed=("gw-c",)) == B
    assert choose(A, C, current=C, failed=("gw-c",)) == C


peers = st.lists(
    st.builds(Peer, st.sampled_from([f"gw-{i}" for i in range(9)]), st.sampled_from(["n1", "n2"]), st.just("x")),
    unique_by=lambda peer: peer.gateway_id,
)


@given(peers, st.sampled_from(["gw-0", "gw-1"]), st.sampled_from(["n1", "n2"]))
def test_it_is_never_itself_and_does_not_depend_on_the_order(listed: list[Peer], own_id: str, own_node: str) -> None:
    chosen = decide(own_id=own_id, own_node=own_node, peers=listed, current=None).peer
    assert chosen == decide(own_id=own_id, own_node=own_node, peers=listed[::-1], current=None).peer
    others = [peer for peer in listed if peer.gateway_id != own_id]
    assert (chosen is None) == (not others)
    assert chosen is None or chosen in others
