"""What a node had done when it was told to go: a small file for whoever starts in its place.

Written at a notice, when seconds count, and possibly read by another version after years: one JSON object, replaced as
a whole, and never trusted when read.
"""

import contextlib
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from kervan.errors import ConfigError
from kervan.notices.events import Notice

logger = logging.getLogger(__name__)

VERSION = 1
MAX_BYTES = 1024 * 1024


class NodeState(msgspec.Struct, frozen=True, kw_only=True):
    """One node's account of itself. `since_s`, `written_s`: Unix time of its start, and of this account."""

    node: str
    since_s: float
    written_s: float
    requests_served: int
    streams_in_flight: int
    streams_moved: int
    notice: Notice | None = None
    version: int = VERSION


def write(state: NodeState, place: str) -> None:
    """Put `state` at `place`, a local path or a URL that fsspec opens (s3://..., gs://..., abfs://...); it blocks.

    A reader finds the old content or the new one, never a part. An object store replaces objects as a whole, a local
    file is renamed into place.

    Raises: ConfigError for a URL that cannot be opened here for want of a package, OSError when writing fails.
    """
    raw = msgspec.json.encode(state)
    if is_url(place):
        with _open(place, "wb") as file:
            file.write(raw)
        return
    path = _local(place)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot, and the file is in place
            os.fsync(directory)  # the name too must outlive the machine, on a disk that does
    finally:
        os.close(directory)


def read(place: str) -> NodeState | None:
    """The state at `place`; None when there is none, or none that can be read (logged as a warning); it blocks.

    Raises: ConfigError as in `write`.
    """
    try:
        if is_url(place):
            with _open(place, "rb") as file:
                raw = file.read(MAX_BYTES + 1)
        else:
            with _local(place).open("rb") as file:
                raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("notices: the state at %s cannot be read: %s", place, error)
        return None
    try:
        if len(raw) > MAX_BYTES:
            raise ValueError(f"longer than {MAX_BYTES} bytes")
        state = msgspec.json.decode(raw, type=NodeState)
        if state.version != VERSION:
            raise ValueError(f"version {state.version}, this is version {VERSION}")
    except (ValueError, RecursionError) as error:
        logger.warning("notices: the state at %s is damaged or not a state: %s", place, error)
        return None
    return state


def is_url(place: str) -> bool:
    """Whether fsspec must open it; `file://` is a local path."""
    return "://" in place and not place.startswith("file://")


def _local(place: str) -> Path:
    return Path(place.removeprefix("file://"))


def _open(place: str, mode: str) -> Any:
    try:
        import fsspec
    except ImportError as error:
        raise ConfigError(
            f"the state file {place!r} is a URL, and the package fsspec that opens URLs is not installed; "
            "pip install fsspec, or give a local path"
        ) from error
    try:
        return fsspec.open(place, mode)
    except (ImportError, ValueError) as error:
        scheme = place.partition("://")[0]
        raise ConfigError(
            f"the state file {place!r} cannot be opened: {' '.join(str(error).split())}; install the package that "
            f"fsspec names for {scheme}://, or give a local path"
        ) from error
