import socket

from kervan.fleet.control import Command, ControlEnd


def test_a_closed_end_is_seen_at_the_other_although_somebody_reads() -> None:
    ours, theirs = map(ControlEnd, socket.socketpair())
    ours.send(Command("drain"))
    assert b"drain" in theirs.receive()
    ours.close()
    assert theirs.receive() == b""
    ours.close()
