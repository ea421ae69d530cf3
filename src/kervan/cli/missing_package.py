"""Which of kervan's extras brings a package that a command needs and that is not installed."""

import importlib.metadata
import re
from collections.abc import Iterable

# What is imported under another name than it is installed by.
_INSTALLED_AS = {"zmq": "pyzmq", "prometheus_client": "prometheus-client", "pynvml": "nvidia-ml-py"}
_BY_VLLM = ("torch", "transformers", "safetensors")
_EXTRA = re.compile(r"^(?P<name>[A-Za-z0-9._-]+).*;\s*extra\s*==\s*[\"'](?P<extra>\w+)[\"']")


def described(error: ModuleNotFoundError) -> str:
    """What is missing and what installs it, in one line; empty for a module that no extra brings: that is a bug."""
    package = (error.name or "").partition(".")[0]
    if package in _BY_VLLM or package == "vllm":
        what = "vLLM" if package == "vllm" else f"{package}, which comes with vLLM"
        return f"this needs {what}: pip install 'kervan[gpu]', or 'kervan[cpu]' without GPUs"
    extras = extras_with(package, importlib.metadata.requires("kervan") or ())
    if not extras:
        return ""
    return f"this needs the package {package}: pip install {' or '.join(repr(f'kervan[{extra}]') for extra in extras)}"


def extras_with(module: str, requirements: Iterable[str]) -> list[str]:
    """Extras whose own requirements name the package of a module; `requirements` as in a wheel's metadata."""
    wanted = _INSTALLED_AS.get(module, module).replace("_", "-").lower()
    found = (_EXTRA.match(requirement) for requirement in requirements)
    return [match["extra"] for match in found if match and match["name"].lower() == wanted and wanted != "kervan"]
