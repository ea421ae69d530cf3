"""Which fleets may share a port, and by which names their models are told apart."""

from typing import Any

import pytest

from kervan.config.fleet import FleetConfig
from kervan.errors import ConfigError
from kervan.fleet.directory import GatewayEntry, Snapshot
from kervan.serve.directory.client import StoredFleet
from kervan.serve.shared_port import Neighbourhood, check, meet, served_names


def fleet(name: str, **more: Any) -> FleetConfig:
    return FleetConfig(**{"model": f"org/{name}", "name": name, "shared_port": True} | more)


@pytest.mark.parametrize(
    ("engine_args", "names"),
    [
        ({}, ("org/a",)),
        ({"served_model_name": "tiny"}, ("tiny",)),
        ({"served_model_name": ["tiny", "small"]}, ("tiny", "small")),
        ({"served_model_name": 7}, ("7",)),
        ({"lora_modules": ["sql=/p", "chat=/q"]}, ("org/a", "sql", "chat")),
        ({"lora_modules": "sql=/p"}, ("org/a", "sql")),
        ({"lora_modules": [{"name": "sql", "path": "/p"}]}, ("org/a", "sql")),
        ({"lora_modules": {"name": "sql", "path": "/p"}}, ("org/a", "sql")),
        ({"lora_modules": ['{"name": "sql", "path": "/p"}']}, ("org/a", "sql")),
        ({"lora_modules": ['{"path": "/p"}', "{nonsense", {"path": "/p"}, 7, None]}, ("org/a",)),
        ({"served_model_name": "tiny", "lora_modules": ["tiny=/p"]}, ("tiny",)),
    ],
)
def test_served_names(engine_args: dict[str, Any], names: tuple[str, ...]) -> None:
    assert served_names(fleet("a", engine_args=engine_args)) == names


def test_fleets_share_when_both_say_so() -> None:
    b, c = fleet("b"), fleet("c", port=9000)
    assert check(fleet("a"), [b, c]) == [b]
    assert check(fleet("a"), [fleet("a"), c]) == []  # itself, as it is now
    assert check(fleet("a", shared_port=False), [c]) == []


@pytest.mark.parametrize(
    ("own", "other", "words"),
    [
        ({"shared_port": False}, {}, "port 8000 of 127.0.0.1 is taken by fleet 'b'; add --shared-port"),
        ({"shared_port": False}, {"shared_port": False}, "is taken by fleet 'b'; add --shared-port"),
        ({}, {"shared_port": False}, "kervan up --name b --shared-port"),
        ({"host": "0.0.0.0"}, {}, "give --host 127.0.0.1"),
        ({}, {"host": "0.0.0.0"}, "give --host 0.0.0.0"),
        ({"host": "::"}, {"host": "0.0.0.0"}, "give --host 0.0.0.0"),
        ({}, {"shared_port": False, "ingress": "serve"}, "--ingress serve shares none; choose another --port"),
        ({"engine_args": {"served_model_name": "org/b"}}, {}, "fleet 'b' answers for model 'org/b'"),
        ({"engine_args": {"lora_modules": ["sql=/p"]}}, {"engine_args": {"served_model_name": "sql"}}, "model 'sql'"),
    ],
)
def test_who_may_not_share_hears_what_to_do(own: dict[str, Any], other: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(fleet("a", **own), [fleet("c", port=9000), fleet("b", **other)])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("one", "two", "do_meet"),
    [
        (("10.0.0.1", 80), ("10.0.0.1", 80), True),
        (("10.0.0.1", 80), ("10.0.0.2", 80), False),
        (("10.0.0.1", 80), ("10.0.0.1", 81), False),
        (("0.0.0.0", 80), ("10.0.0.1", 80), True),
        (("10.0.0.1", 80), ("::", 80), True),
    ],
)
def test_addresses_that_meet(one: tuple[str, int], two: tuple[str, int], do_meet: bool) -> None:
    a, b = (fleet(name, host=host, port=port) for name, (host, port) in (("a", one), ("b", two)))
    assert meet(a, b) is meet(b, a) is do_meet


def gateway(name: str) -> GatewayEntry:
    return GatewayEntry(name, "h", 1, "", f"http://h/{name}", True)


def told(neighbourhood: Neighbourhood, other: FleetConfig, *names: str, secret: str = "s") -> dict[str, list[str]]:
    """What is known after a directory has told of its fleet with these gateways."""
    neighbourhood.take(StoredFleet(other, secret), Snapshot(1, [], [gateway(name) for name in names], []))
    return {known.name: [g.id for g in known.gateways] for known in neighbourhood.listed()}


def test_a_neighbour_is_known_as_its_directory_tells() -> None:
    hood, other = Neighbourhood(fleet("a")), fleet("b", api_keys=("k",), engine_args={"lora_modules": ["sql=/p"]})
    assert told(hood, other) == {"b": []}
    assert told(hood, other, "g1", "g2") == {"b": ["g1", "g2"]}
    assert told(hood, other, "g2") == {"b": ["g2"]}
    (known,) = hood.listed()
    assert (known.models, known.has_keys) == (("org/b", "sql"), True)
    assert told(hood, fleet("c", port=9000), "g3") == {"b": ["g2"]}
    assert told(hood, fleet("d", shared_port=False), "g4") == {"b": ["g2"]}
    assert told(hood, fleet("b", port=9000), "g2") == {}  # it has moved to another port


def test_a_restarted_directory_hides_no_gateway() -> None:
    """It knows none before the next beats."""
    hood, other = Neighbourhood(fleet("a")), fleet("b")
    told(hood, other, "g1", "g2")
    assert told(hood, other) == {"b": ["g1", "g2"]}
    assert told(hood, other, "g2") == {"b": ["g2"]}
    assert told(hood, other, secret="another") == {"b": []}  # a new fleet of this name
