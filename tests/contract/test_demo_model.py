import json
from pathlib import Path

import pytest

from kervan.demo import PAIRS, TOOL_TURN, WEATHER_TOOL, make_demo_model, make_lora_adapter, make_random_model
from kervan.errors import ConfigError

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # torch and transformers deprecate their own parts on import


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_model(tmp_path_factory.mktemp("random"))


@pytest.fixture(scope="module")
def tokenizer(model_directory: Path) -> transformers.PreTrainedTokenizerFast:
    return transformers.AutoTokenizer.from_pretrained(model_directory)


@pytest.mark.parametrize("text", [*PAIRS.values(), "", "a\n\tb", "caf\u00e9 \u4e2d \U0001f42a", "<think>x</think>"])
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_answers_have_60_to_150_tokens(tokenizer):
    assert all(60 <= len(tokenizer.encode(answer)) <= 150 for answer in PAIRS.values())


def test_template_is_chatml(tokenizer):
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|bos|><|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"


def test_template_renders_tools_and_calls_alike_for_text_and_mapping(tokenizer):
    call = TOOL_TURN[1]["tool_calls"][0]["function"]
    parsed = {"role": "assistant", "content": None, "tool_calls": [{**call, "arguments": {"city": "Ankara"}}]}
    texts = [
        tokenizer.apply_chat_template([TOOL_TURN[0], answer, *TOOL_TURN[2:]], tools=[WEATHER_TOOL], tokenize=False)
        for answer in (TOOL_TURN[1], parsed)
    ]
    assert texts[0] == texts[1]
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Ankara"}}\n</tool_call>' in texts[0]
    assert "<tool_response>\nsunny, 24 degrees\n</tool_response>" in texts[0]
    assert '"name": "get_weather"' in texts[0].split("</tools>")[0]


def test_second_make_changes_nothing(model_directory):
    before = {path.name: path.stat().st_mtime_ns for path in model_directory.iterdir()}
    assert make_random_model(model_directory) == model_directory
    assert before == {path.name: path.stat().st_mtime_ns for path in model_directory.iterdir()}


def test_other_recipe_replaces_the_model(tmp_path):
    first = make_random_model(tmp_path / "model").joinpath("model.safetensors").read_bytes()
    assert make_random_model(tmp_path / "model", seed=1).joinpath("model.safetensors").read_bytes() != first
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_strange_directory_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="name an empty or new directory"):
        make_random_model(tmp_path)


def test_lora_shapes_fit_the_model(model_directory, tmp_path):
    from safetensors.numpy import load_file

    adapter = make_lora_adapter(model_directory, tmp_path / "lora")
    weights = load_file(adapter / "adapter_model.safetensors")
    # 2 layers x (q, v) x (A, B); q: 4 heads x 64 = 256 outputs, v: 2 x 64 = 128
    assert len(weights) == 8
    prefix = "base_model.model.model.layers.1.self_attn."
    assert weights[f"{prefix}q_proj.lora_A.weight"].shape == (8, 128)
    assert weights[f"{prefix}q_proj.lora_B.weight"].shape == (256, 8)
    assert weights[f"{prefix}v_proj.lora_B.weight"].shape == (128, 8)
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 8


def test_lora_needs_a_model(tmp_path):
    with pytest.raises(ConfigError, match="make_demo_model"):
        make_lora_adapter(tmp_path, tmp_path / "lora")


def test_the_model_of_the_package_gives_every_answer(tmp_path):
    import torch

    from kervan.demo import train

    directory = make_demo_model(tmp_path / "demo")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    margin, held_out = train.margins(model.eval(), tokenizer, torch.device("cpu"), 16)
    # teacher forcing: where the right token leads at every position, greedy decoding gives the same text
    assert margin > train.MIN_MARGIN
    assert held_out > 0.9
    assert sum(file.stat().st_size for file in directory.iterdir()) < train.MAX_MB * 1e6


@pytest.mark.timeout(120)
def test_training_that_is_too_short_saves_nothing(tmp_path, capsys):
    from kervan.demo import train

    arguments = ["--device", "cpu", "--steps", "1", "--hidden", "64", "--layers", "1"]
    assert train.train(train.parsed([*arguments, "--output", str(tmp_path / "out")])) == 1
    assert "give more --steps" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
