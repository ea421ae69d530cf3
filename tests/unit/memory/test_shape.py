"""Shapes of decoders."""

from pathlib import Path

import pytest
from harness.places import REPOSITORY

from kervan.errors import ConfigError
from kervan.memory import shape

MODELS = REPOSITORY / "benchmarks" / "models"


def test_a_config_and_its_named_shape_are_the_same_model() -> None:
    read = shape.read(str(MODELS / "llama3-8b"))
    assert read.parameters == shape.NAMED["8b"].parameters == 8_030_261_248


@pytest.mark.parametrize("name", list(shape.NAMED))
def test_named_shapes_cut_their_heads_evenly(name: str) -> None:
    named = shape.NAMED[name]
    assert named.num_heads % named.num_kv_heads == 0
    assert shape.read(name) is named


def test_flops_of_a_step_by_hand() -> None:
    # 6 a weight of a product and token; attention: 6 x layers x heads x size x seq, causal
    tiny = shape.NAMED["tiny"]
    weights = 4 * (64 * (64 + 64 + 2 * 32) + 3 * 64 * 192) + 512 * 64
    assert tiny.step_flops(2, 100) == 200 * (6 * weights + 6 * 4 * 64 * 100)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("8B", "no directory with a config.json, and no named shape; give a model's directory, or one of tiny"),
        (str(MODELS / "mixtral-8x7b"), "layers of kind Experts"),
        (str(MODELS / "deepseek-v2-lite"), "layers of kind LatentAttention"),
    ],
)
def test_models_that_cannot_be_measured_are_told_apart(model: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        shape.read(model)


def test_a_broken_config_is_an_error_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        shape.read(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="holds a JSON list"):
        shape.read(str(tmp_path))
