"""What a Hugging Face `config.json` says of a model: its layers, the sizes of their weights, and what they keep.

`spec` is what a model is made of; `read` reads it; `layers` knows the spellings of which layer is what; `blocks` has
the shapes; `families` what a `model_type` implies; `fields` which fields are read, harmless or refused; `quantization`
how weights are stored; `towers` what sees and hears.
"""

from kervan.facts.architecture.quantization import in_fp8
from kervan.facts.architecture.read import parse
from kervan.facts.architecture.spec import (
    Attention,
    Cut,
    Experts,
    LatentAttention,
    Layer,
    Mlp,
    ModelSpec,
    Part,
    Quantization,
    StateLayer,
    Storage,
    Weight,
)

__all__ = [
    "Attention",
    "Cut",
    "Experts",
    "LatentAttention",
    "Layer",
    "Mlp",
    "ModelSpec",
    "Part",
    "Quantization",
    "StateLayer",
    "Storage",
    "Weight",
    "in_fp8",
    "parse",
]
