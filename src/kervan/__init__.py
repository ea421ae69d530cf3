"""LLM serving on many GPUs whose streams never break."""

__version__ = "0.1.0"

__all__ = ["__version__"]
