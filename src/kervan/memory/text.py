"""Text to train on, as bytes: Python's own language reference, which every Python carries, or files that are given.

Python's documentation is under the Python Software Foundation License; it is read where it lies, and not copied.
"""

from collections.abc import Sequence
from pathlib import Path

from kervan.errors import ConfigError

VOCAB = 256


def read(files: Sequence[Path]) -> bytes:
    """The files one after the other, or without any the language reference. Raises: ConfigError."""
    if not files:
        try:
            from pydoc_data import topics  # type: ignore[import-not-found,unused-ignore]
        except ImportError:
            raise ConfigError(
                "this Python comes without its language reference (pydoc_data); give text files with --text"
            ) from None
        return "\n\n".join(topics.topics[name] for name in sorted(topics.topics)).encode()
    parts = []
    for file in files:
        try:
            parts.append(file.read_bytes())
        except OSError as error:
            raise ConfigError(f"--text {file} cannot be read: {error.strerror}") from error
    return b"\n\n".join(parts)


def check(text: bytes, seq: int) -> None:
    """Raises: ConfigError for a text with no whole sequence."""
    if len(text) < 2 * (seq + 1):
        raise ConfigError(
            f"the text has {len(text):,} bytes, and a step reads sequences of {seq + 1} from it; give more "
            "with --text, or "
            f"--seq {max(1, len(text) // 2 - 1)}"
        )
