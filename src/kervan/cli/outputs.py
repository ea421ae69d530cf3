"""Files and directories that commands write: checked before any work is done, by one rule.

They go where a directory exists already. Making one would hide a misspelt path until somebody looks for the result.
"""

import os
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


def _check_directory(option: str, path: Path, directory: Path) -> None:
    if not directory.exists():
        raise ConfigError(f"{option} {path}: directory {directory} does not exist; make it first, or give another path")
    if not directory.is_dir():
        raise ConfigError(f"{option} {path}: {directory} is a file, not a directory; give another path")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ConfigError(f"{option} {path}: directory {directory} may not be written by this user; give another path")
