"""What a server is and runs on, as far as it says so itself."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kervan.units import plural

# `owned_by` in /v1/models -> the product that writes it.
_OWNERS = {"vllm": "vLLM", "sglang": "SGLang", "llamacpp": "llama.cpp", "kervan": "kervan"}
_HTTP_LIBRARIES = ("uvicorn", "granian", "hypercorn", "basehttp", "simplehttp", "python")  # say nothing of the product


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedBy:
    """A server. Empty, 0 or None: it does not say.

    `engine`: what runs the model, where that is another product. `layout`: of each replica, like TP2xPP2.
    """

    product: str = ""
    version: str = ""
    engine: str = ""
    gpu: str = ""
    layout: str = ""
    replicas: int = 0
    is_simulated: bool | None = None

    def __str__(self) -> str:
        """`kervan 1.0 (vLLM 0.24.0), 2 simulated replicas of TP2 on H200`, or less; empty when nothing is known."""
        name = f"{self.product} {self.version}".strip() + (f" ({self.engine})" if self.engine else "")
        simulated = "simulated " if self.is_simulated else ""
        parts = (
            plural(self.replicas, f"{simulated}replica") if self.replicas else f"{simulated}replicas" * bool(simulated)
        )
        if parts and self.layout:
            parts += f" of {self.layout}"
        if parts and self.gpu:
            parts += f" on {self.gpu}"
        return ", ".join(filter(None, (name, parts)))

    def to_dict(self) -> dict[str, Any]:
        """For JSON and records; what is not known is None."""
        return {
            "product": self.product or None,
            "version": self.version or None,
            "engine": self.engine or None,
            "gpu": self.gpu or None,
            "layout": self.layout or None,
            "replicas": self.replicas or None,
            "simulated": self.is_simulated,
        }


def from_status(status: Any, model: str, engine_version: str) -> ServedBy | None:
    """What kervan's status page says; None of a page that is not kervan's. `engine_version`: that of /version.

    The page is that of whichever fleet on the port answered, so what it says of replicas counts only if it has `model`.
    """
    if not isinstance(status, dict) or not isinstance(status.get("replicas"), dict) or "gateway" not in status:
        return None
    about = status.get("about")
    about = about if isinstance(about, dict) else {}
    name = ServedBy(product="kervan", version=str(about.get("kervan") or ""), engine=f"vLLM {engine_version}".strip())
    models = about.get("models")
    if not isinstance(models, list) or model not in models:
        return name
    return replace(
        name,
        gpu=str(about.get("gpu") or ""),
        layout=str(about.get("layout") or ""),
        replicas=len(status["replicas"]),
        is_simulated=bool(about.get("simulated")),
    )


def from_headers(headers: Mapping[str, str], owner: str, version: str) -> ServedBy:
    """What `owned_by` of its models, /version and the header Server say."""
    product = _OWNERS.get(owner.lower(), "")
    if product or version:
        return ServedBy(product=product, version=version)
    name, _, number = headers.get("server", "").partition(" ")[0].partition("/")
    return ServedBy() if name.lower().startswith(_HTTP_LIBRARIES) else ServedBy(product=name, version=number)
