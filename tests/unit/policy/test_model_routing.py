import pytest
from hypothesis import given
from hypothesis import strategies as st

from kervan.policy.model_routing import GatewayCandidate, PortFleet, decide, in_order, owners

A = PortFleet("a", ("llama", "sql"))
B = PortFleet("b", ("qwen",))
LOCKED = PortFleet("c", ("secret",), has_keys=True)


@pytest.mark.parametrize(
    ("request_", "fleet"),
    [
        pytest.param({"model": "llama"}, "a", id="base model"),
        pytest.param({"model": "sql"}, "a", id="adapter"),
        pytest.param({"model": "qwen"}, "b", id="the other fleet's model"),
        pytest.param({"fleet": "b"}, "b", id="fleet"),
        pytest.param({"fleet": "b", "model": "llama"}, "b", id="the fleet decides, and refuses the model itself"),
        pytest.param({"fleet": "a", "needs_model": True}, "a", id="a fleet is enough"),
        pytest.param({}, "b", id="any will do: where it came in"),
    ],
)
def test_where_a_request_goes(request_: dict, fleet: str) -> None:
    asked = {"model": None, "fleet": None, "needs_model": False, **request_}
    assert decide([A, B], own="b", **asked).fleet == fleet


@pytest.mark.parametrize(
    ("fleets", "request_", "status", "param", "words"),
    [
        ([A, B], {"model": "gpt"}, 404, "model", "`gpt` does not exist; models here: llama, qwen, sql"),
        ([A, B], {"fleet": "z"}, 404, "fleet", "no fleet 'z' is on this port; fleets here: a, b"),
        ([A, B], {"needs_model": True}, 400, "model", "2 fleets share this port"),
        ([A, B], {"needs_model": True}, 400, "model", "models here: llama, qwen, sql"),
        ([A, B], {"model": ""}, 404, "model", "models here"),
        ([A, LOCKED], {"model": "gpt"}, 404, "model", "GET /v1/models lists what your API key opens"),
        ([A, LOCKED], {"fleet": "z"}, 404, "fleet", "no fleet 'z' is on this port"),
    ],
)
def test_what_is_refused_and_how(fleets: list, request_: dict, status: int, param: str, words: str) -> None:
    asked = {"model": None, "fleet": None, "needs_model": False, **request_}
    route = decide(fleets, own="a", **asked)
    assert (route.fleet, route.status, route.param) == (None, status, param)
    assert words in route.reason
    if LOCKED in fleets:  # names are not told to everybody
        assert not any(name in route.reason for name in ("secret", "llama"))


NAMES = st.sampled_from(["llama", "qwen", "sql", "vision"])
FLEETS = st.dictionaries(st.sampled_from("abcd"), st.sets(NAMES), min_size=1)


@given(FLEETS, NAMES, st.data())
def test_every_gateway_of_a_port_sends_a_model_to_the_same_fleet(
    models: dict[str, set[str]], model: str, data: st.DataObject
) -> None:
    fleets = [PortFleet(name, tuple(names)) for name, names in models.items()]
    shuffled = data.draw(st.permutations(fleets))
    routes = {decide(shuffled, own=name, model=model, fleet=None, needs_model=True).fleet for name in models}
    having = sorted(name for name, names in models.items() if model in names)
    assert routes == {having[0] if having else None}
    assert owners(shuffled) == owners(fleets)


def gateway(url: str, *, has_model: bool = True, is_ready: bool = True, is_near: bool = True) -> GatewayCandidate:
    return GatewayCandidate(url, has_model, is_ready, is_near)


@pytest.mark.parametrize(
    ("gateways", "turn", "order"),
    [
        ([], 3, []),
        ([gateway("x"), gateway("y")], 0, ["x", "y"]),
        ([gateway("x"), gateway("y")], 1, ["y", "x"]),
        ([gateway("far", is_near=False), gateway("x"), gateway("y")], 1, ["y", "x", "far"]),
        ([gateway("x", is_ready=False), gateway("far", is_near=False)], 0, ["far", "x"]),
        ([gateway("x", is_ready=False)], 7, ["x"]),
        # An adapter that was loaded at run time is known where it was loaded.
        ([gateway("x", has_model=False), gateway("y", is_ready=False)], 0, ["y", "x"]),
    ],
)
def test_gateways_in_the_order_in_which_they_are_tried(
    gateways: list[GatewayCandidate], turn: int, order: list[str]
) -> None:
    assert in_order(gateways, turn) == order


def test_the_best_gateways_take_turns() -> None:
    gateways = [gateway("x"), gateway("far", is_near=False), gateway("y"), gateway("z")]
    assert [in_order(gateways, turn)[0] for turn in range(6)] == ["x", "y", "z", "x", "y", "z"]
