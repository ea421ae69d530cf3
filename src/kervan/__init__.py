"""LLM serving on many GPUs whose streams never break."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kervan.serve.handle import get_fleet as get_fleet

__version__ = "0.1.0"

__all__ = ["__version__", "get_fleet"]


def __getattr__(name: str) -> Any:
    """`get_fleet` needs Ray, which is loaded when it is first asked for."""
    if name == "get_fleet":
        from kervan.serve.handle import get_fleet

        return get_fleet
    raise AttributeError(f"module 'kervan' has no attribute {name!r}")
