"""Files and directories that commands write: checked before any work is done, by one rule.

They go where a directory exists already. Making one would hide a misspelt path until somebody looks for the result.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from kervan.errors import ConfigError


def check_file(option: str, path: Path | None) -> None:
    """Do nothing for a file that can be written, or for None.

    Raises: ConfigError for a directory, for a file in a directory that does not exist, and for one that may not be
    written.
    """
    if path is None:
        return
    if path.is_dir():
        raise ConfigError(f"{option} {path} is a directory; give a file in it")
    _check_directory(option, path, path.parent)
    if path.exists() and not os.access(path, os.W_OK):
        raise ConfigError(f"{option} {path} may not be written by this user; give another file")


def check_directory(option: str, path: Path | None) -> None:
    """Do nothing for a directory in which files can be made, or for None. Raises: ConfigError for any other."""
    if path is not None:
        _check_directory(option, path, path)


def check_record(option: str, path: Path | None) -> None:
    """For an option that takes a file ending in .json, or a directory for a new one. Raises: ConfigError, as above."""
    if path is None or path.is_dir() or path.suffix != ".json":
        check_directory(option, path)
    else:
        check_file(option, path)


def write_files(option: str, directory: Path, texts: Mapping[str, str]) -> list[Path]:
    """Write all of `texts`, by their names in `directory`, which is made if it is not there.

    All places are looked at before, and all texts are on the disk before the first takes its place: a full disk or a
    directory in the way leaves what was there.

    Raises: ConfigError, which names what is in the way.
    """
    check_directory(option, directory if directory.exists() else directory.absolute().parent)
    places = {name: directory / name for name in texts}
    for place in places.values():
        _check_place(option, directory, place)
    is_new = not directory.exists()
    try:
        directory.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".kervan-", dir=directory) as scratch:
            for number, text in enumerate(texts.values()):
                (Path(scratch) / str(number)).write_text(text)
            for number, place in enumerate(places.values()):
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(Path(scratch) / str(number), place.resolve())  # of a link, what it leads to
    except OSError as error:
        if is_new:
            with contextlib.suppress(OSError):
                directory.rmdir()
        reason = error.strerror or error
        raise ConfigError(f"{option} {directory} cannot be written: {reason}; give another directory") from error
    return list(places.values())


def _check_place(option: str, directory: Path, place: Path) -> None:
    """For a file below a directory that may not be there yet."""
    for parent in place.parents[: len(place.relative_to(directory).parts) - 1]:
        if parent.exists() or parent.is_symlink():
            _check_directory(option, directory, parent)
    if place.is_symlink() and not place.exists():
        raise ConfigError(
            f"{option} {directory}: {place} is a link that leads nowhere; remove it, or give another directory"
        )
    if place.is_dir():
        raise ConfigError(
            f"{option} {directory}: {place} is a directory, and a file is to be there; move it away, or give another "
            "directory"
        )
    if place.exists() and not os.access(place, os.W_OK):
        raise ConfigError(f"{option} {directory}: {place} may not be written by this user; give another directory")


def _check_directory(option: str, path: Path, directory: Path) -> None:
    if not directory.exists():
        raise ConfigError(f"{option} {path}: directory {directory} does not exist; make it first, or give another path")
    if not directory.is_dir():
        raise ConfigError(f"{option} {path}: {directory} is a file, not a directory; give another path")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ConfigError(f"{option} {path}: directory {directory} may not be written by this user; give another path")
