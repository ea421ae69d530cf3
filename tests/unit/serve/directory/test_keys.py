"""The directory follows the file of keys, and keeps what it has read when the file is gone."""

from pathlib import Path

import msgspec
import pytest

from kervan.config import key_file
from kervan.config.api_keys import KeyEntry, digest
from kervan.config.fleet import FleetConfig
from kervan.serve import ray_internals
from kervan.serve.directory.keys import FleetKeys, StoredKeys, read_file, read_stored, store_key

WEB, BATCH = (KeyEntry(name=name, digest=digest(name)) for name in ("web", "batch"))


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Stands for Ray's store."""
    kept: dict[str, bytes] = {}
    monkeypatch.setattr(ray_internals, "kv_put", kept.__setitem__)
    monkeypatch.setattr(ray_internals, "kv_get", kept.get)
    return kept


class Changes:
    def __init__(self) -> None:
        self.number = 0

    def __call__(self) -> None:
        self.number += 1


def look(keys: FleetKeys) -> list[str]:
    keys._look()
    keys._renew()
    return [entry.name for entry in keys.table.entries]


def test_changes_of_the_file_are_taken_and_stored(store: dict[str, bytes], tmp_path: Path) -> None:
    path, changes = tmp_path / "keys.yaml", Changes()
    key_file.write(path, [WEB])
    config = FleetConfig(model="m", api_keys=("k",), api_keys_file=str(path))
    keys = FleetKeys(config, read_file(config), changes)
    assert [entry.name for entry in keys.table.entries] == ["web", "key-1"]
    assert look(keys) == ["web", "key-1"]
    key_file.write(path, [WEB, BATCH])
    assert look(keys) == ["web", "batch", "key-1"]
    assert changes.number == 1
    stored = read_stored("default")
    assert stored == StoredKeys(str(path), (WEB, BATCH))
    assert msgspec.json.decode(store[store_key("default")], type=StoredKeys) == stored
    key_file.write(path, [])
    assert look(keys) == ["key-1"]


def test_without_its_file_a_directory_goes_on_with_what_was_stored(store: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    config = FleetConfig(model="m", api_keys_file=str(path))
    keys = FleetKeys(config, StoredKeys(str(path), (WEB,)), Changes())
    assert look(keys) == ["web"]
    assert "no such file of API keys" in keys.problem
    assert "keeps the 1 keys that it knows of it" in keys.problem
    path.write_text("keys: 1")
    assert look(keys) == ["web"]
    assert "holds no list" in keys.problem
    key_file.write(path, [BATCH])
    assert look(keys) == ["batch"]
    assert keys.problem == ""


def test_a_file_of_which_nothing_is_known_lets_nobody_in(store: dict[str, bytes], tmp_path: Path) -> None:
    config = FleetConfig(model="m", api_keys_file=str(tmp_path / "keys.yaml"))
    keys = FleetKeys(config, None, Changes())
    assert look(keys) == []
    assert not keys.table.is_open


def test_other_settings_bring_another_file_or_none(store: dict[str, bytes], tmp_path: Path) -> None:
    one, two, changes = str(tmp_path / "one"), str(tmp_path / "two"), Changes()
    keys = FleetKeys(FleetConfig(model="m", api_keys_file=one), StoredKeys(one, (WEB,)), changes)
    keys.set_config(FleetConfig(model="m", api_keys_file=two), StoredKeys(two, (BATCH,)))
    assert [entry.name for entry in keys.table.entries] == ["batch"]
    keys.set_config(FleetConfig(model="m"), None)
    assert keys.table.is_open
    assert changes.number == 2
