import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kervan.config import fleet
from kervan.config.fleet import OWNED_ENGINE_ARGS, FleetConfig, PoolBounds, from_mapping
from kervan.errors import ConfigError
from kervan.facts import model

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


@pytest.mark.parametrize("key", OWNED_ENGINE_ARGS)
def test_engine_arguments_that_kervan_sets_are_refused(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FleetConfig(model="m", engine_args={key: "1"})
    assert str(caught.value) == f"engine argument {key!r} is kervan's to set; use {OWNED_ENGINE_ARGS[key]}"


def test_streams_that_come_every_few_tokens_cannot_be_given_again() -> None:
    FleetConfig(model="m", replay_s=60, engine_args={"stream_interval": "1"})
    with pytest.raises(ConfigError, match=r"replay_s=60 with stream_interval=8.*leave one of both out"):
        FleetConfig(model="m", replay_s=60, engine_args={"stream_interval": 8})


# ---- fleet config: vLLM's arguments


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("max_model_len", "4096", ["--max-model-len", "4096"]),
        ("max_model_len", 4096, ["--max-model-len", "4096"]),
        ("gpu_memory_utilization", 0.8, ["--gpu-memory-utilization", "0.8"]),
        ("enforce_eager", True, ["--enforce-eager"]),
        ("enable_prefix_caching", False, ["--no-enable-prefix-caching"]),
        ("hf_overrides", {"a": [1]}, ["--hf-overrides", '{"a": [1]}']),
        ("served_model_name", ["a", "b"], ["--served-model-name", "a", "b"]),
        ("lora_modules", [{"name": "l", "path": "/p"}], ["--lora-modules", '{"name": "l", "path": "/p"}']),
        ("chat_template", "{{ messages }}", ["--chat-template", "{{ messages }}"]),
    ],
)
def test_engine_arguments_become_vllms_words(key: str, value: Any, words: list[str]) -> None:
    argv = FleetConfig(model="m", engine_args={key: value}).engine_argv
    start = argv.index(words[0])
    assert list(argv[start : start + len(words)]) == words


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


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("max_model_len=4096", ("max_model_len", "4096")),
        ("a=b=c", ("a", "b=c")),
        ("--dtype=half", ("dtype", "half")),
        (" a =", ("a", "")),
    ],
)
def test_assignments(text: str, pair: tuple[str, str]) -> None:
    assert fleet.parse_assignment(text, "--engine-arg") == pair


@pytest.mark.parametrize("text", ["foo", "=1", "", "  =1"])
def test_no_assignment_shows_the_form(text: str) -> None:
    with pytest.raises(ConfigError, match=r"has no key=value form; write for example --engine-arg max_model_len=4096"):
        fleet.parse_assignment(text, "--engine-arg")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("False", False),
        ('{"a": 1}', {"a": 1}),
        ("[1, 2]", [1, 2]),
        ("4096", "4096"),
        ("8k", "8k"),
        ("", ""),
        ("half", "half"),
    ],
)
def test_engine_values_are_read_only_where_vllm_could_not(text: str, value: Any) -> None:
    assert fleet.parse_engine_value(text) == value


def test_broken_json_names_the_likely_cause() -> None:
    with pytest.raises(ConfigError, match=r"not valid JSON .*; quote it for the shell"):
        fleet.parse_engine_value("{a: 1}")


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
        ("f.yaml", b"a: [1\n", "cannot be read"),
        ("f.toml", b"a = \n", "cannot be read"),
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


def test_a_missing_file_and_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist; check the path given to --config"):
        fleet.load_file(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        fleet.load_file(tmp_path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"modle": "m"}, "has unknown setting 'modle'; did you mean 'model'?"),
        ({"model": "m", "replica": 2}, "did you mean 'replicas'?"),
        ({"model": "m", "api_key": ["k"]}, "did you mean 'api_keys'?"),
        ({"model": "m", "qqq": 2}, "known settings: api_keys, device, drain_timeout_s, "),
        ({}, "names no model; give MODEL"),
        ({"model": ""}, "names no model; give MODEL"),
        ({"model": 7}, "model=7 is int; give text"),
        ({"model": "m", "tp": "2"}, "tp='2' is str; give a whole number"),
        ({"model": "m", "tp": 2.0}, "tp=2.0 is float; give a whole number"),
        ({"model": "m", "tp": True}, "tp=True is bool; give a whole number"),
        ({"model": "m", "shared_port": "yes"}, "shared_port='yes' is str; give true or false"),
        ({"model": "m", "shared_port": 1}, "shared_port=1 is int; give true or false"),
        ({"model": "m", "shared_port": True, "ingress": "serve"}, "use it with --ingress direct"),
        ({"model": "m", "hold_timeout_s": "1m"}, "is str; give a number"),
        ({"model": "m", "api_keys": "k"}, "is str; give a list"),
        ({"model": "m", "api_keys": [1]}, "is list; give a list"),
        ({"model": "m", "engine_args": ["a=b"]}, "is list; give a mapping"),
        ({"model": "m", "env": None}, "is NoneType; give a mapping"),
        ({"model": "m", "ingress": "nginx"}, "ingress='nginx' is not one of direct, serve"),
        ({"model": "m", "engine_args": {"tensor-parallel-size": 2}}, "'tensor_parallel_size' is kervan's to set; use --tp"),
    ],
)  # fmt: skip
def test_wrong_settings_name_the_fix(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        fleet.from_mapping(settings, "config file f.yaml")
    assert words in str(caught.value)


def test_truth_is_read_as_such() -> None:
    assert fleet.from_mapping({"model": "m", "shared_port": True}, "f").shared_port is True


def test_whole_numbers_serve_as_seconds() -> None:
    assert fleet.from_mapping({"model": "m", "hold_timeout_s": 5}, "f").hold_timeout_s == 5.0


@given(
    st.builds(
        FleetConfig,
        model=st.text(min_size=1),
        tp=st.integers(1, 64),
        replicas=st.integers(0, 4096),
        port=st.integers(1, 65535),
        ingress=st.sampled_from(["direct", "serve"]),
        api_keys=st.lists(st.text(), max_size=3).map(tuple),
        engine_args=st.dictionaries(
            st.sampled_from(["max_model_len", "dtype", "hf_overrides"]), st.one_of(st.booleans(), st.integers(), st.text())
        ),
        env=st.dictionaries(st.text("AB", min_size=1), st.text()),
        drain_timeout_s=st.floats(0, 1e6),
    )
)  # fmt: skip
def test_a_config_survives_storage(config: FleetConfig) -> None:
    assert FleetConfig.from_json(config.to_json()) == config


# ---- models


def write_config(directory: Path, config: Any) -> str:
    (directory / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return str(directory)


LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def test_a_directory_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m").mkdir()
    monkeypatch.chdir(tmp_path)
    assert model.resolve("m") == model.resolve("./m") == str((tmp_path / "m").resolve())
    monkeypatch.setenv("HOME", str(tmp_path))
    assert model.resolve("~/m") == str((tmp_path / "m").resolve())


@pytest.mark.parametrize("name", ["Qwen/Qwen3-8B", "meta-llama/Llama-3.1-8B-Instruct", "a/b.c_d"])
def test_a_hub_id_stays(name: str) -> None:
    assert model.resolve(name) == name
    assert model.read_config(name) is None


@pytest.mark.parametrize("name", ["./none", "/none/at/all", "~/none", "none", "a/b/c", "-x/y", "a b/c"])
def test_what_is_neither_directory_nor_id_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"check the path, or give an id such as Qwen/Qwen3-8B"):
        model.resolve(name)


def test_a_file_is_refused_with_its_directory_except_gguf(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.touch()
    with pytest.raises(ConfigError, match=f"give the directory that holds its config.json: {tmp_path}"):
        model.resolve(str(weights))
    gguf = tmp_path / "model.gguf"
    gguf.touch()
    assert model.resolve(str(gguf)) == str(gguf)


def test_a_good_config_is_read(tmp_path: Path) -> None:
    assert model.read_config(write_config(tmp_path, LLAMA)) == LLAMA


@pytest.mark.parametrize(
    ("config", "words"),
    [
        pytest.param(None, "has no config.json; give a directory in Hugging Face format", id="none"),
        pytest.param("{", "cannot be read as JSON", id="no JSON"),
        pytest.param("[1]", "holds a JSON list, not an object", id="no object"),
        pytest.param({"model_type": "llama"}, "lacks architectures; copy them", id="no architectures"),
        pytest.param({"architectures": ["X"]}, "lacks model_type; copy them", id="no model type"),
        pytest.param({"architectures": []}, "lacks architectures and model_type", id="neither"),
        pytest.param({}, "lacks architectures and model_type", id="empty"),
    ],
)
def test_a_bad_config_is_refused(tmp_path: Path, config: Any, words: str) -> None:
    if config is not None:
        write_config(tmp_path, config)
    with pytest.raises(ConfigError) as caught:
        model.read_config(str(tmp_path))
    assert words in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_binary_in_place_of_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\x80\x81")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        model.read_config(str(tmp_path))


def test_mistrals_own_format_is_left_to_vllm(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text("{}")
    assert model.read_config(str(tmp_path)) is None


@pytest.mark.parametrize(
    ("fields", "tp", "pp", "error"),
    [
        pytest.param({"num_attention_heads": 32, "num_hidden_layers": 32}, 8, 4, None, id="fits"),
        pytest.param({"num_attention_heads": 14}, 4, 1,
                     "tp=4 does not divide 14 attention heads; use 1, 2, 7 or 14 (--tp)", id="tp"),
        pytest.param({"num_attention_heads": 1}, 2, 1, "tp=2 does not divide 1 attention heads; use 1 (--tp)", id="one head"),
        pytest.param({"num_attention_heads": 12}, 24, 1,
                     "tp=24 does not divide 12 attention heads; use 1, 2, 3, 4, 6 or 12 (--tp)", id="more than heads"),
        pytest.param({"num_hidden_layers": 2}, 1, 3,
                     "pp=3 stages need as many layers, the model has 2; use at most --pp 2", id="pp"),
        pytest.param({"num_hidden_layers": 2}, 1, 2, None, id="a layer per stage"),
        pytest.param({"text_config": {"num_attention_heads": 6}}, 4, 1,
                     "tp=4 does not divide 6 attention heads; use 1, 2, 3 or 6 (--tp)", id="nested text config"),
        pytest.param({}, 8, 8, None, id="fields unknown: vLLM decides"),
        pytest.param({"num_attention_heads": None}, 3, 1, None, id="null: vLLM decides"),
        pytest.param(None, 3, 1, None, id="hub id: vLLM decides"),
    ],
)  # fmt: skip
def test_layouts_that_do_not_fit_the_model(fields: dict[str, Any] | None, tp: int, pp: int, error: str | None) -> None:
    if error is None:
        model.check_layout(fields, tp=tp, pp=pp)
        return
    with pytest.raises(ConfigError) as caught:
        model.check_layout(fields, tp=tp, pp=pp)
    assert str(caught.value) == error


@pytest.mark.parametrize(
    ("replicas", "env", "expected"),
    [
        pytest.param(1, {}, {}, id="one engine may have vLLM's own binding"),
        pytest.param(2, {}, {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "4"}, id="8 cores / 2"),
        pytest.param(9, {}, {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}, id="at least one"),
        pytest.param(2, {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}, {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}, id="the user's"),
    ],
)
def test_cpu_replicas_share_the_cores(
    replicas: int, env: dict[str, str], expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kervan.serve.start import on_cpu

    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    config = FleetConfig(model="m", replicas=replicas, env=env)
    assert on_cpu(config, cores=8).env == expected


@pytest.mark.parametrize(
    ("words", "cores", "number"),
    [
        ({}, 2, 1),
        ({}, 16, 2),
        ({}, 128, 4),
        ({"max_gateways": 1}, 128, 1),  # --gateways 0..1
        ({"max_gateways": 3}, 128, 3),
        ({"max_gateways": 8}, 16, 2),
        ({"max_gateways": 8}, 128, 4),
        ({"gateways": 6, "max_gateways": 8}, 128, 6),
    ],
)
def test_there_is_a_gateway_for_8_cores_up_to_4_and_to_the_most_allowed(
    words: dict[str, int], cores: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kervan.serve.start import num_gateways

    monkeypatch.setattr("os.cpu_count", lambda: cores)
    assert num_gateways(FleetConfig(model="m", **words)) == number
    FleetConfig(model="m", **words | {"gateways": number})  # is no contradiction


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
        ({"pools": {"on-demand": "1.."}}, "'1..' is no number and no range MIN..MAX; write for example --pool on-d"),
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
