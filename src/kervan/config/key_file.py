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
MAX_BYTES = 4 * 2**20
HEAD = """\
# API keys of kervan fleets: names, digests and limits; the keys themselves are nowhere.
# kervan keys add, limit and revoke change it, and fleets that use it follow within seconds.
"""


def read(path: Path) -> list[KeyEntry]:
    """The keys of a file.

    Raises: ConfigError when it is missing, unreadable, or no such file.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe or a device may never end
            raise ConfigError(f"{path} is no regular file, so it can have no API keys; give another file")
        if found.st_size > MAX_BYTES:
            raise ConfigError(
                f"{path} has {found.st_size:,} bytes, above the {MAX_BYTES:,} of a file of API keys; give another file"
            )
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file of API keys; kervan keys add NAME --file {path} begins it") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no text in UTF-8, so it can have no API keys; give another file") from error
    except OSError as error:
        raise ConfigError(
            f"{path}: the API keys cannot be read ({error.strerror or error}); give a file that this user may read"
        ) from error
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
def changing(path: Path, begins: bool = False) -> Iterator[list[KeyEntry]]:
    """The keys of the file, to be changed in place; they are written at the end of the block. None else writes then.

    `begins`: a file that is missing begins empty, and its directory is made. Raises: ConfigError.
    """
    try:
        directory = path.resolve().parent
        if begins:
            directory.mkdir(parents=True, exist_ok=True)
        elif signature(path) is None:
            read(path)  # raises
        lock = os.open(directory, os.O_RDONLY)  # the directory stays, where the file is replaced
    except (OSError, RuntimeError) as error:  # RuntimeError: Python before 3.13, of links in a ring
        raise _not_written(path, error) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        entries = [] if begins and signature(path) is None else read(path)
        before = list(entries)
        yield entries
        if entries != before or signature(path) is None:
            write(path, entries)
    finally:
        os.close(lock)


def _not_written(path: Path, error: OSError | RuntimeError) -> ConfigError:
    reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
    return ConfigError(f"{path}: the API keys cannot be written ({reason}); give another --file")
