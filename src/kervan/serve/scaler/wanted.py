"""What the scaler writes and Serve's controller reads, in Ray's own store: neither may wait for the other."""

import logging
import threading
import time
from collections.abc import Sequence

import msgspec

from kervan.serve import ray_internals

logger = logging.getLogger(__name__)

APP_PREFIX = "kervan-"  # of a fleet's application in Serve
READ_PERIOD_S = 0.25
FORGET_S = 60.0  # after Serve has asked of a fleet for the last time


class Wanted(msgspec.Struct, frozen=True):
    """Replicas that each pool is to have; and Serve's ids of all that are there, those first that go first."""

    targets: dict[str, int]
    leaving: list[str] = []


NOTHING = Wanted({})


def _key(fleet_name: str) -> str:
    return f"wanted of fleet {fleet_name}"


def publish(fleet_name: str, wanted: Wanted) -> None:
    """Let Serve's controller know. Raises: what Ray raises."""
    ray_internals.kv_put(_key(fleet_name), msgspec.json.encode(wanted))


def published(fleet_name: str) -> Wanted | None:
    """What was published last, None for nothing. Raises: what Ray raises."""
    stored = ray_internals.kv_get(_key(fleet_name))
    return None if stored is None else msgspec.json.decode(stored, type=Wanted)


def forget(fleet_name: str) -> None:
    """Forget what was published of a fleet that is no more."""
    ray_internals.kv_delete(_key(fleet_name))


# ---- in Serve's controller


class _Reader:
    """What is published of the fleets that Serve asks for, read by a thread; what was read last stays if that fails."""

    def __init__(self) -> None:
        self._asked_s: dict[str, float] = {}
        self._wanted: dict[str, Wanted] = {}
        self._thread: threading.Thread | None = None

    def latest(self, fleet_name: str) -> Wanted:
        self._asked_s[fleet_name] = time.monotonic()
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._read_forever, daemon=True, name="wanted")
            self._thread.start()
        return self._wanted.get(fleet_name, NOTHING)

    def _read_forever(self) -> None:
        while True:
            for fleet_name, asked_s in list(self._asked_s.items()):
                if time.monotonic() - asked_s > FORGET_S:
                    self._asked_s.pop(fleet_name, None)
                    self._wanted.pop(fleet_name, None)
                    continue
                try:
                    found = published(fleet_name)
                except Exception as error:  # noqa: BLE001 - the store is away, or has what another version wrote
                    logger.warning("what fleet %s wants cannot be read: %s", fleet_name, error)
                else:
                    self._wanted[fleet_name] = found or self._wanted.get(fleet_name, NOTHING)
            time.sleep(READ_PERIOD_S)


_reader = _Reader()


def latest(fleet_name: str) -> Wanted:
    """What was published, as a thread has read it within the last fraction of a second. Never waits, never raises."""
    return _reader.latest(fleet_name)


def leaving(app_name: str) -> Sequence[str]:
    """Serve's ids of the replicas of a fleet's application, those first that are to go first."""
    return latest(app_name.removeprefix(APP_PREFIX)).leaving if app_name.startswith(APP_PREFIX) else ()
