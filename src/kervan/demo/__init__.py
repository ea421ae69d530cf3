"""Tiny models, shipped or made on the spot: nothing is downloaded."""

from kervan.demo.model import (
    PAIRS,
    REASONED,
    TOOL_TURN,
    WEATHER_TOOL,
    known_answers,
    make_demo_model,
    make_embedding_model,
    make_lora_adapter,
    make_random_model,
)

__all__ = [
    "PAIRS",
    "REASONED",
    "TOOL_TURN",
    "WEATHER_TOOL",
    "known_answers",
    "make_demo_model",
    "make_embedding_model",
    "make_lora_adapter",
    "make_random_model",
]
