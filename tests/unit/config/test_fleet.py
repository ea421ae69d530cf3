import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kervan.config import fleet
from kervan.config.api_keys import hashed
from kervan.config.fleet import FleetConfig, PoolBounds, from_mapping
from kervan.errors import ConfigError

# ---- fleet config: values


@pytest.mark.parametrize("name", ["a", "chat", "chat-2", "0", "a" * 40])
def test_valid_names(name: str) -> None:
    assert FleetConfig(model="m", name=name).name == name


@pytest.mark.parametrize("name", ["", "Chat", "-a", "a-", "a_b", "a/b", "../a", "a b", "a\n", "a" * 41])
def test_invalid_names_say_what_is_valid(name: str) -> None:
    with pytest.raises(ConfigError, match="lower-case letters, digits and hyphens"):
        FleetConfig(model="m", name=name)


@pytest.mark.parametrize(
    ("key", "value", "low_high"),
    [
        ("tp", 0, "1..64"),
        ("tp", 65, "1..64"),
        ("pp", -1, "1..64"),
        ("replicas", -1, "0..4096"),
        ("replicas", 4097, "0..4096"),
        ("gateways", 65, "0..64"),
        ("port", 0, "1..65535"),
        ("port", 65536, "1..65535"),
        ("max_queued_streams", -1, "0.."),
        ("hold_timeout_s", -0.1, "0.."),
        ("stall_timeout_s", 0.5, "1.."),
        ("replay_s", -1.0, "0..86400"),
        ("replay_max_mib", 0, "1..1048576"),
        ("drain_timeout_s", float("nan"), "0.."),
        ("drain_timeout_s", float("inf"), "0.."),
    ],
)
def test_values_out_of_range_name_the_range(key: str, value: float, low_high: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FleetConfig(model="m", **{key: value})
    assert str(caught.value).startswith(f"{key}={value} is outside {low_high}")


def test_streams_that_come_every_few_tokens_cannot_be_given_again() -> None:
    FleetConfig(model="m", replay_s=60, engine_args={"stream_interval": "1"})
    with pytest.raises(ConfigError, match=r"replay_s=60 with stream_interval=8.*leave one of both out"):
        FleetConfig(model="m", replay_s=60, engine_args={"stream_interval": 8})


# ---- fleet config: vLLM's arguments


@pytest.mark.parametrize(("tp", "pp", "has_executor"), [(1, 1, False), (2, 1, True), (1, 2, True), (4, 2, True)])
def test_the_layout_is_part_of_vllms_arguments(tp: int, pp: int, has_executor: bool) -> None:
    config = FleetConfig(model="org/m", tp=tp, pp=pp)
    argv = " ".join(config.engine_argv)
    assert f"--model org/m --tensor-parallel-size {tp} --pipeline-parallel-size {pp}" in argv
    assert ("--distributed-executor-backend mp" in argv) is has_executor
    assert config.world_size == tp * pp


def test_the_sender_cache_for_images_is_off_unless_asked_for() -> None:
    # It assumes one receiver; a fleet has many.
    assert "--mm-processor-cache-gb 0" in " ".join(FleetConfig(model="m").engine_argv)
    asked = FleetConfig(model="m", engine_args={"mm_processor_cache_gb": 4}).engine_argv
    assert "--mm-processor-cache-gb 4" in " ".join(asked)
    assert asked.count("--mm-processor-cache-gb") == 1


# ---- fleet config: files and mappings


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("f.yaml", "model: org/m\ntp: 2\nengine_args:\n  max-model-len: 4096\n  enforce_eager: true\nenv: {A: 1}\n"),
        ("f.yml", '{"model": "org/m", "tp": 2, "engine_args": {"max_model_len": 4096, "enforce_eager": true}, "env": {"A": 1}}'),
        ("f.toml", 'model = "org/m"\ntp = 2\n[engine_args]\nmax_model_len = 4096\nenforce_eager = true\n[env]\nA = 1\n'),
    ],
)  # fmt: skip
def test_files_say_the_same_in_yaml_json_and_toml(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert fleet.from_mapping(fleet.load_file(path), str(path)) == FleetConfig(
        model="org/m", tp=2, engine_args={"max_model_len": 4096, "enforce_eager": True}, env={"A": "1"}
    )


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("f.yaml", b"a: [1\n", "cannot be read: line 1, 'a: [1', is no valid YAML; look at indentation"),
        ("f.yaml", b"tp: 2\n\tpp: 2\n", r"line 2, '\tpp: 2', is no valid YAML"),
        ("f.yaml", b"a: 2026-11-31\n", "cannot be read: day is out of range for month"),
        ("f.yaml", b"[" * 5000, "cannot be read: it is nested too deeply"),
        ("f.toml", b"tp = 2\na = \n", "line 2, 'a = ', is no valid TOML"),
        ("f.yaml", b"\xff\xfe\x00", "cannot be read"),
        ("f.yaml", b"just words\n", "holds str, not settings; write lines such as 'tp: 2'"),
        ("f.yaml", b"", "holds NoneType, not settings"),
        ("f.yaml", b"- tp\n", "holds list, not settings"),
    ],
)
def test_unreadable_files_are_named_in_one_line(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        fleet.load_file(path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_have_the_words_of_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_text("model: m\ndrain-timeout-s: 2min\nhold_timeout_s: 90\nreplay_s: 500ms\ngateways: 1..4\n")
    assert fleet.from_mapping(fleet.load_file(path), str(path)) == FleetConfig(
        model="m", drain_timeout_s=120.0, hold_timeout_s=90.0, replay_s=0.5, gateways=1, max_gateways=4
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("replay-s: 1\nreplay_s: 2", "gives replay_s twice, with - and with _; give it once"),
        ("gateways: 4..1", "gateways='4..1' is neither a number nor a range MIN..MAX; write 2 or 1..4"),
        ("gateways: many", "gateways='many' is neither a number nor a range"),
        ("gateways: 1..4\nmax_gateways: 3", "gives max_gateways twice, with gateways=1..4; give it once"),
    ],
)
def test_files_that_contradict_themselves(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "f.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(words)):
        fleet.load_file(path)


def test_a_missing_file_and_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist; check the path given to --config"):
        fleet.load_file(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        fleet.load_file(tmp_path)


SESSIONS: dict[str, Any] = {"model": "m", "env": {"SAGEMAKER_ENABLE_STATEFUL_SESSIONS": "true"}}


@pytest.mark.parametrize("more", [{"gateways": 1}, {"env": {"SAGEMAKER_ENABLE_STATEFUL_SESSIONS": "false"}}])
def test_sessions_that_one_gateway_keeps(more: dict[str, Any]) -> None:
    assert fleet.from_mapping(SESSIONS | more, "f").model == "m"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"modle": "m"}, "has unknown setting 'modle'; did you mean 'model'?"),
        ({"model": "m", "replica": 2}, "did you mean 'replicas'?"),
        ({"model": "m", "api_key": ["k"]}, "did you mean 'api_keys'?"),
        ({"model": "m", "qqq": 2}, "known settings: adds_nodes, api_keys, api_keys_file, autoscaling, device, drain_timeout_s, "),
        ({}, "names no model; give MODEL"),
        ({"model": ""}, "names no model; give MODEL"),
        ({"model": 7}, "model=7 is int; give text"),
        ({"model": "m", "tp": "2"}, "tp='2' is str; give a whole number"),
        ({"model": "m", "tp": 2.0}, "tp=2.0 is float; give a whole number"),
        ({"model": "m", "tp": True}, "tp=True is bool; give a whole number"),
        ({"model": "m", "shared_port": "yes"}, "shared_port='yes' is str; give true or false"),
        ({"model": "m", "shared_port": 1}, "shared_port=1 is int; give true or false"),
        ({"model": "m", "shared_port": True, "ingress": "serve"}, "use it with --ingress direct"),
        ({"model": "m", "hold_timeout_s": "soon"}, "hold_timeout_s 'soon' is not a duration; write a number and us, ms"),
        ({"model": "m", "hold_timeout_s": [1]}, "is list; give a number"),
        (SESSIONS, "SAGEMAKER_ENABLE_STATEFUL_SESSIONS=true keeps sessions in one gateway, and --gateways 0 may start"),
        (SESSIONS | {"gateways": 1, "max_gateways": 2}, "and --gateways 1..2 may start several; add --gateways 1, or"),
        ({"model": "m", "api_keys": "k"}, "is str; give a list"),
        ({"model": "m", "api_keys": [1]}, "is a list with int; give a list"),
        ({"model": "m", "engine_args": ["a=b"]}, "is list; give a mapping"),
        ({"model": "m", "env": None}, "is NoneType; give a mapping"),
        ({"model": "m", "ingress": "nginx"}, "ingress='nginx' is not one of direct, serve"),
        ({"model": "m", "ingress": ["serve"]}, "ingress=['serve'] is not one of direct, serve"),
        ({"model": "m", "device": "TPU"}, "device='TPU' is not one of GPU, CPU"),
        ({"model": "m", "tp": {"a": 1}}, "tp={'a': 1} is dict; give a whole number"),
        ({"model": "m", "hold_timeout_s": 10**30}, "hold_timeout_s="),
        ({"model": "m", "engine_args": {"tensor-parallel-size": 2}}, "'tensor_parallel_size' is kervan's to set; use --tp"),
        ({"model": "m", "engine_args": {"data_parallel_size": 8}}, "'vllm serve' alone starts ranks that share experts"),
        ({"model": "m", "ep": 8}, "use --ep 1, or --tp 8 --ep 8"),
        ({"model": "m", "ep": 8, "tp": 4}, "use --ep 1 or --ep 4"),
    ],
)  # fmt: skip
def test_wrong_settings_name_the_fix(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        fleet.from_mapping(settings, "config file f.yaml")
    assert words in str(caught.value)


def test_every_setting_is_described_in_a_line_and_every_number_has_its_range() -> None:
    for setting in fleet.SETTINGS.values():
        assert setting.description.isprintable()
        assert (setting.bounds is not None) == (setting.type in (int, float))
        if setting.bounds is not None:
            assert setting.bounds[0] <= setting.default <= setting.bounds[1]


def test_truth_is_read_as_such() -> None:
    assert fleet.from_mapping({"model": "m", "shared_port": True}, "f").shared_port is True


def test_whole_numbers_serve_as_seconds() -> None:
    assert fleet.from_mapping({"model": "m", "hold_timeout_s": 5}, "f").hold_timeout_s == 5.0


KEY_LETTERS = "".join(map(chr, range(33, 127)))


@given(
    st.builds(
        FleetConfig,
        model=st.text(min_size=1),
        tp=st.integers(1, 64),
        replicas=st.integers(0, 4096),
        port=st.integers(1, 65535),
        ingress=st.sampled_from(["direct", "serve"]),
        api_keys=st.lists(st.text(KEY_LETTERS, min_size=1), max_size=3).map(hashed),
        engine_args=st.dictionaries(
            st.sampled_from(["max_model_len", "dtype", "hf_overrides"]), st.one_of(st.booleans(), st.integers(), st.text())
        ),
        env=st.dictionaries(st.text("AB", min_size=1), st.text(st.characters(exclude_characters="\0"))),
        drain_timeout_s=st.floats(0, 1e6),
    )
)  # fmt: skip
def test_a_config_survives_storage(config: FleetConfig) -> None:
    assert FleetConfig.from_json(config.to_json()) == config


# ---- pools


def test_pools_say_how_many_of_each_market_type() -> None:
    config = from_mapping({"model": "m", "pools": {"on_demand": 2, "spot": "0..6"}}, "a file")
    assert config.bounds == {"on-demand": PoolBounds(2, 2), "spot": PoolBounds(0, 6)}
    assert config.replicas == 2  # the least of both
    assert FleetConfig.from_json(config.to_json()) == config
    assert [str(bounds) for bounds in config.bounds.values()] == ["2", "0..6"]
    assert FleetConfig(model="m", replicas=3).bounds == {"on-demand": PoolBounds(3, 3)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"pools": {"spot": "0..6"}}, "add --pool on-demand:1, or --pool on-demand:0..1 for one only while spot is"),
        ({"pools": {"on-demand": 1, "gold": 2}}, "pool 'gold' is not one of on-demand, spot"),
        (
            {"pools": {"on-demand": "1.."}},
            "'1..' is neither a number nor a range MIN..MAX; write for example --pool on-d",
        ),
        ({"pools": {"on-demand": "4..2"}}, "goes from 4 down to 2; write --pool on-demand:2..4"),
        ({"pools": {"on-demand": 0, "spot": 0}}, "room for 0 replicas; give one more"),
        ({"pools": {"on-demand": 5000}}, "5000 is above 4096"),
        ({"pools": {"on-demand": 2}, "replicas": 3}, "replicas=3 beside pools, whose least are 2 in all"),
        ({"pools": ["spot"]}, "give a mapping"),
    ],
)
def test_bad_pools(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        from_mapping({"model": "m", **words}, "a file")
