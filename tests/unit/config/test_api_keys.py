"""Keys, their digests, and the file of them."""

import hashlib
import multiprocessing
import os
import stat
from pathlib import Path

import pytest
import yaml

from kervan.config import api_keys, key_file
from kervan.config.api_keys import KeyEntry, KeyTable, entries_of, hashed, named_keys, new_key, table_of
from kervan.config.fleet import from_mapping, load_file
from kervan.errors import ConfigError

DIGEST = hashlib.sha256(b"k").hexdigest()


def test_a_new_key_has_256_random_bits_that_urls_and_shells_take() -> None:
    keys = {new_key() for _ in range(50)}
    assert len(keys) == 50
    assert all(key.startswith("kv-") and len(key) == 3 + 43 for key in keys)
    assert all(key.replace("-", "").replace("_", "").isalnum() for key in keys)


def test_settings_keep_digests_and_no_keys() -> None:
    config = from_mapping({"model": "m", "api_keys": ["a secret:1", f"web=sha256:{DIGEST}"]}, "a file")
    assert config.api_keys == (f"key-1=sha256:{hashlib.sha256(b'a secret:1').hexdigest()}", f"web=sha256:{DIGEST}")
    assert "secret" not in config.to_json()
    assert hashed(config.api_keys) == config.api_keys
    assert entries_of(config.api_keys)[1] == KeyEntry(name="web", digest=DIGEST)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("s3cret", "api_keys is str; give a list of texts"),
        ({"web": "s3cret"}, "api_keys is dict; give a list of texts"),
        (["s3cret", 5], "api_keys is a list with int; give a list of texts"),
        (["web=sha256:s3cret"], "api_keys has no SHA-256 after sha256:; write NAME=sha256: and its 64"),
    ],
)
def test_what_is_wrong_with_keys_of_the_settings_is_told_without_them(setting: object, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as error:
        from_mapping({"model": "m", "api_keys": setting}, "a file")
    assert "s3cret" not in str(error.value)


@pytest.mark.parametrize("name", ["api_keys", "api-keys"])
def test_a_broken_config_file_shows_no_key(tmp_path: Path, name: str) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text(f"model: m\n{name}: [s3cret\n")
    with pytest.raises(ConfigError, match="line 2 is no valid YAML") as told:
        load_file(path)
    assert "s3cret" not in str(told.value)


def test_keys_of_the_environment_have_names() -> None:
    assert named_keys("web:k1, batch:a:b") == {"web": "k1", "batch": "a:b"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("web", "entry 1 of 1 has no NAME:KEY form; write web:KEY,batch:KEY"),
        ("web:k1,,", "entry 2 of 3 has no NAME:KEY form"),
        ("we b:k1", "'we b' is no name of a key"),
        ("web:", "the key of web is empty"),
        ("web:k1,web:k2", "has the name web twice"),
        ("", "entry 1 of 1 has no"),
    ],
)
def test_what_is_wrong_with_keys_of_the_environment_is_told_without_them(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as told:
        named_keys(text)
    assert "k1" not in str(told.value)


def test_a_fleet_is_open_without_keys_and_closed_with_an_empty_file() -> None:
    assert table_of((), None) == KeyTable()
    assert table_of((), None).is_open
    assert not table_of((), []).is_open
    assert not table_of(("k",), None).is_open


def test_the_entry_of_the_file_counts_where_both_name_a_key() -> None:
    limited = KeyEntry(name="web", digest=DIGEST, streams=3)
    assert table_of((f"web=sha256:{'0' * 64}",), [limited]).entries == (limited,)
    assert table_of(("k",), [limited]).entries == (limited,)
    assert [entry.name for entry in table_of(("other",), [limited]).entries] == ["web", "key-1"]


def test_a_file_is_for_its_owner_alone_and_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "more" / "keys.yaml"
    entry = KeyEntry(name="web", digest=DIGEST, requests_per_minute=60, models=("a", "b"), expires_s=5)
    with key_file.changing(path, begins=True) as entries:
        entries.append(entry)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert key_file.read(path) == [entry]
    assert list(path.parent.iterdir()) == [path]
    assert key_file.warning(path) == ""
    path.chmod(0o660)
    assert "mode 660" in key_file.warning(path)
    first = key_file.signature(path)
    with key_file.changing(path) as entries:
        entries.clear()
    assert key_file.read(path) == []
    assert first != key_file.signature(path) is not None
    assert key_file.signature(tmp_path / "none") is None


def test_a_file_behind_a_link_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    key_file.write(tmp_path / "real.yaml", [])
    (tmp_path / "link.yaml").symlink_to(tmp_path / "real.yaml")
    key_file.write(tmp_path / "link.yaml", [KeyEntry(name="web", digest=DIGEST)])
    assert (tmp_path / "link.yaml").is_symlink()
    assert [entry.name for entry in key_file.read(tmp_path / "real.yaml")] == ["web"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keys: [", "is not valid YAML|cannot be read"),
        ("a: 1", "holds no list `keys`"),
        ("keys: 3", "holds no list `keys`"),
        ("keys: [3]", "key 1: it is a whole number, not a mapping; "),
        ("keys: [{name: a}]", "it lacks required field `digest`"),
        (f"keys: [{{name: a, digest: {DIGEST}, rpm: 3}}]", "it has unknown field `rpm`"),
        ("keys: [{name: 12}]", "key 1: name is a whole number, not text"),
        (f"keys: [{{name: a, digest: {DIGEST}, models: b}}]", "models is text, not a list"),
        (f"keys: [{{name: a, digest: {DIGEST}, streams: yes}}]", "streams is true or false, not a whole number"),
        (f"keys: [{{name: a, digest: {DIGEST}, expires_s: 2027-01-01}}]", "expires_s is date, not a whole number"),
        ("keys: [{name: a, digest: abc}]", "the digest of a is not 64 hexadecimal digits"),
        (f"keys: [{{name: '', digest: {DIGEST}}}]", "is no name of a key"),
        (f"keys: [{{name: a, digest: {DIGEST}, streams: -1}}]", "streams=-1 of a is outside"),
        (f"keys: [{{name: a, digest: {DIGEST}, models: ['']}}]", "models of a has an empty name"),
        (f"keys: [{{name: a, digest: {DIGEST}}}, {{name: a, digest: {'f' * 64}}}]", "has the name a twice"),
        (f"keys: [{{name: a, digest: {DIGEST}}}, {{name: b, digest: {DIGEST}}}]", f"has the digest {DIGEST} twice"),
        ("", "move it away, and kervan keys add NAME begins another"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as told:
        key_file.read(path)
    assert "\n" not in str(told.value)
    assert str(path) in str(told.value)


def test_a_missing_file_says_how_it_begins(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kervan keys add NAME --file"):
        key_file.read(tmp_path / "keys.yaml")


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(ConfigError, match="is no regular file"):
            key_file.read(path)


def test_a_file_too_large_for_keys_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    with path.open("wb") as file:
        file.truncate(key_file.MAX_BYTES + 1)
    with pytest.raises(ConfigError, match="has 4,194,305 bytes, above the 4,194,304"):
        key_file.read(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is no text in UTF-8"):
        key_file.read(path)


def test_a_path_that_cannot_be_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "ring").symlink_to("ring")
    for path in (tmp_path / "ring", tmp_path / ("x" * 300)):
        with pytest.raises(ConfigError, match=r"cannot be (read|written)"), key_file.changing(path, begins=True):
            pass


def test_a_change_of_a_missing_file_makes_no_directory(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match="no such file of API keys"),
        key_file.changing(tmp_path / "more" / "keys.yaml"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def _add(path: str, names: list[str]) -> None:
    for name in names:
        with key_file.changing(Path(path), begins=True) as entries:
            entries.append(KeyEntry(name=name, digest=api_keys.digest(name)))


def test_two_writers_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    context = multiprocessing.get_context("fork")
    names = [[f"{who}{number}" for number in range(20)] for who in "ab"]
    writers = [context.Process(target=_add, args=(str(path), own)) for own in names]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert {entry["name"] for entry in yaml.safe_load(path.read_text())["keys"]} == {*names[0], *names[1]}
