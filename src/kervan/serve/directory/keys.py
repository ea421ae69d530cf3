"""The API keys of a fleet, which its directory keeps for the gateways of all nodes.

They come from the fleet's settings, and from a file that `kervan keys` changes. The directory follows that file where
it can see it, and stores what it read last with Ray: a directory that has moved to a node without the file goes on with
that, and gateways need no file at all.
"""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import msgspec

from kervan.config import key_file
from kervan.config.api_keys import KeyEntry, KeyTable, table_of
from kervan.config.fleet import FleetConfig
from kervan.errors import ConfigError
from kervan.serve import ray_internals

logger = logging.getLogger(__name__)

LOOK_PERIOD_S = 1.0


class StoredKeys(msgspec.Struct, frozen=True):
    """What was read last of the file at `path`."""

    path: str
    entries: tuple[KeyEntry, ...]


class FleetKeys:
    """The keys of one fleet. `changed` is called when `table` is another than before."""

    def __init__(self, config: FleetConfig, stored: StoredKeys | None, changed: Callable[[], None]) -> None:
        self._config = config
        self._stored = stored
        self._changed = changed
        self._seen: tuple[int, ...] | None = None
        self._problem = ""
        self.table = self._table()

    @property
    def problem(self) -> str:
        """Why the keys are not as the file has them; empty where they are."""
        return self._problem

    def set_config(self, config: FleetConfig, stored: StoredKeys | None) -> None:
        """Other settings; `stored`: what was read of their file, if it was."""
        self._config = config
        if stored is not None:
            self._keep(stored)
        self._seen, self._problem = None, ""
        self._renew()

    async def follow(self) -> None:
        """Look at the file again and again."""
        while True:
            try:
                await asyncio.to_thread(self._look)
            except Exception:  # supervised: the keys stay, and are looked at again
                logger.exception("the API keys were not looked at")
            self._renew()
            await asyncio.sleep(LOOK_PERIOD_S)

    def _look(self) -> None:
        if not (name := self._config.api_keys_file):
            self._problem = ""
            return
        path = Path(name)
        seen = key_file.signature(path)
        if seen is not None and seen == self._seen:
            return
        before, self._problem = self._problem, ""
        try:
            self._keep(StoredKeys(name, tuple(key_file.read(path))))
            self._seen = seen
        except ConfigError as error:
            self._problem = f"{error}; the fleet keeps the {len(self._of_file())} keys that it knows of it"
        if self._problem and self._problem != before:
            logger.warning("%s", self._problem)

    def _keep(self, stored: StoredKeys) -> None:
        if stored != self._stored:
            self._stored = stored
            ray_internals.kv_put(store_key(self._config.name), msgspec.json.encode(stored))

    def _of_file(self) -> tuple[KeyEntry, ...]:
        stored = self._stored
        return stored.entries if stored is not None and stored.path == self._config.api_keys_file else ()

    def _table(self) -> KeyTable:
        of_file = self._of_file() if self._config.api_keys_file else None
        return table_of(self._config.api_keys, of_file, self._problem)

    def _renew(self) -> None:
        if (table := self._table()) != self.table:
            self.table = table
            self._changed()


def read_file(config: FleetConfig) -> StoredKeys | None:
    """The keys of the file that the settings name, if they name one.

    Raises: ConfigError when it cannot be read.
    """
    if not config.api_keys_file:
        return None
    return StoredKeys(config.api_keys_file, tuple(key_file.read(Path(config.api_keys_file))))


def read_stored(fleet_name: str) -> StoredKeys | None:
    """What the directory before this one has stored."""
    stored = ray_internals.kv_get(store_key(fleet_name))
    return None if stored is None else msgspec.json.decode(stored, type=StoredKeys)


def store_key(fleet_name: str) -> str:
    """The name in Ray's store."""
    return f"API keys of fleet {fleet_name}"
