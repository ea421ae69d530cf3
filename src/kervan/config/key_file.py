"""The file of a fleet's API keys: YAML that `kervan keys` writes, and fleets read and follow."""

import contextlib
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import yaml

from kervan.config.api_keys import KeyEntry, read_entries
from kervan.errors import ConfigError
from kervan.facts.markup import broken

MODE = 0o600
HEAD = """\
# API keys of kervan fleets: names, digests and limits; the keys themselves are nowhere.
# kervan keys add, limit and revoke change it, and fleets that use it follow within seconds.
"""


def read(path: Path) -> list[KeyEntry]:
    """The keys of a file.

    Raises: ConfigError when it is missing, unreadable, or no such file.
    """
    try:
        text = path.read_text()
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file of API keys; kervan keys add NAME --file {path} begins it") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the API keys cannot be read ({' '.join(str(error).split())})") from error
    try:
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} {broken(error, text)}") from error
    return read_entries(data, str(path))


def warning(path: Path) -> str:
    """What is wrong with who may write the file; empty if nothing is."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError:
        return ""
    if not mode & 0o022:
        return ""
    return f"{path} has mode {mode:o}: others than its owner can let themselves in; chmod 600 {path}"


def signature(path: Path) -> tuple[int, ...] | None:
    """What differs after each change of the file; None while there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def write(path: Path, entries: Sequence[KeyEntry]) -> None:
    """Replace the file whole, readable for its owner alone: who reads meanwhile has the old or the new one.

    Raises: ConfigError when the directory cannot be written to.
    """
    text = HEAD + yaml.safe_dump({"keys": [msgspec.to_builtins(entry) for entry in entries]}, sort_keys=False)
    target = path.resolve()  # a link stays one
    try:
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise _not_written(path, error) from error
    try:
        with os.fdopen(descriptor, "w") as file:
            os.fchmod(descriptor, MODE)
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        Path(name).replace(target)
    except OSError as error:
        raise _not_written(path, error) from error
    finally:
        Path(name).unlink(missing_ok=True)


@contextlib.contextmanager
def changing(path: Path) -> Iterator[list[KeyEntry]]:
    """The keys of the file, to be changed in place; they are written at the end of the block. None else writes then.

    A file that is missing begins empty. Raises: ConfigError.
    """
    directory = path.resolve().parent
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory, os.O_RDONLY)  # the directory stays, where the file is replaced
    except OSError as error:
        raise _not_written(path, error) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        entries = read(path) if path.exists() else []
        before = list(entries)
        yield entries
        if entries != before or not path.exists():
            write(path, entries)
    finally:
        os.close(lock)


def _not_written(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{path}: the API keys cannot be written ({error.strerror or error}); give another --file")
