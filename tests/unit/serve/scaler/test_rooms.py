"""How many replicas can be placed, while Ray is placing some."""

from kervan.serve.scaler.rooms import PLACING_S, Rooms


def test_what_ray_is_placing_is_not_taken_for_full() -> None:
    """Two run and six are wanted: Ray takes the last four devices at once, and two are listed later than the others."""
    rooms = Rooms()
    assert rooms.room("p") is None
    rooms.look({"p": 6}, {"p": 2}, {"p": 2}, 0)
    rooms.look({"p": 2}, {"p": 2}, {"p": 6}, 1)
    assert rooms.room("p") == 6
    rooms.look({"p": 4}, {"p": 4}, {"p": 6}, 3)
    assert rooms.room("p") == 6
    rooms.look({"p": 6}, {"p": 6}, {"p": 6}, 5)
    assert rooms.room("p") == 6


def test_what_is_not_placed_for_long_has_no_room() -> None:
    rooms = Rooms()
    rooms.look({"p": 6}, {"p": 2}, {"p": 2}, 0)
    rooms.look({"p": 3}, {"p": 3}, {"p": 6}, 1)
    rooms.look({"p": 3}, {"p": 3}, {"p": 6}, 1 + PLACING_S)
    assert rooms.room("p") == 6
    rooms.look({"p": 3}, {"p": 3}, {"p": 6}, 2 + PLACING_S)
    assert rooms.room("p") == 3


def test_room_that_appears_or_goes_while_all_are_there_is_seen_at_once() -> None:
    rooms = Rooms()
    rooms.look({"p": 2}, {"p": 2}, {"p": 2}, 0)
    rooms.look({"p": 8}, {"p": 2}, {"p": 2}, 1)
    assert rooms.room("p") == 8
    rooms.look({"p": 3}, {"p": 2}, {"p": 2}, 2)
    assert rooms.room("p") == 3
