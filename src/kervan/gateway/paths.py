"""What the paths of requests are for."""

from kervan.vendor import vllm_names

SIMPLE_NAMES = frozenset({"/generate", "/chat"})  # `kervan.gateway.simple`
WORK_PATHS = vllm_names.WORK_PATHS | SIMPLE_NAMES


def makes_work(path: str) -> bool:
    """Whether a POST there needs a replica, so that admission decides on it.

    Cancelling, rendering and counting must stay possible in a full fleet.
    """
    is_idle = path.endswith(vllm_names.IDLE_SUFFIXES)
    return path in WORK_PATHS or (path.startswith(vllm_names.WORK_PREFIXES) and not is_idle)


def is_docs(path: str) -> bool:
    """Whether it is a part of the API's description, which anybody may read; calls from it need a key."""
    return path in vllm_names.DOCS_PATHS or path.startswith(vllm_names.DOCS_FILES)
