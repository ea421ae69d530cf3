"""What Ray raises, as errors of kervan; and an end of waiting where Ray has none."""

import contextlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TypeVar

from kervan.errors import FleetError
from kervan.serve import ray_auth

ANSWER_TIMEOUT_S = 30.0  # Ray restarts an actor in some seconds, and more on a busy machine

T = TypeVar("T")


@contextlib.contextmanager
def as_fleet_error(what: str) -> Iterator[None]:
    """Within the block Ray is asked for something; `what` says, as a clause, what has failed if it does not answer.

    Raises: FleetError in place of what Ray raises while an actor, its GCS or this process's connection is away.
    """
    from ray.exceptions import AuthenticationError, RayError

    try:
        yield
    except AuthenticationError as error:  # trying again is no fix
        raise FleetError(f"{what}: {ray_auth.refusal()}") from error
    except (RayError, RuntimeError, OSError) as error:  # timeouts are among them, Ray's and asyncio's
        first_line = next(iter(str(error).strip().splitlines()), "")[:200]
        reason = f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
        raise FleetError(f"{what} ({reason}); try again in a few seconds") from error


@contextlib.contextmanager
def unsaid(error: type[Exception]) -> Iterator[None]:
    """Keep back what Ray's C++ code logs before it raises `error`: no level of its logging leaves that out.

    All else that is written to file descriptor 2 within the block is written after it. A call of Ray's that may hang is
    made with `wait_for` inside: what is written once the wait is over, is seen.
    """
    kept = os.dup(2)
    is_said = True
    try:
        with tempfile.TemporaryFile() as said:
            os.dup2(said.fileno(), 2)
            try:
                yield
            except error:
                is_said = False
                raise
            finally:
                os.dup2(kept, 2)
                said.seek(0)
                if is_said and (text := said.read()):
                    os.write(2, text)
    finally:
        os.close(kept)


class _Abandoned:
    """Whether this process has a thread that waits for Ray and cannot be ended."""

    is_any = False


def is_any_abandoned() -> bool:
    """Whether a call of `wait_for` has been given up. Ray's own end of the process may wait as long: use `os._exit`."""
    return _Abandoned.is_any


def bounded(what: str, call: Callable[[], T], timeout_s: float = ANSWER_TIMEOUT_S) -> T:
    """As `wait_for`; `what` as of `as_fleet_error`. Raises: FleetError when it takes longer, and for Ray's errors."""
    with as_fleet_error(what):
        return wait_for(call, timeout_s)


def wait_for(call: Callable[[], T], timeout_s: float) -> T:
    """What `call` returns, which asks Ray: most of what it offers waits for good for a part that is stopped.

    It runs in a thread of its own, which goes on if it takes longer.

    Raises: TimeoutError then; what `call` raises.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:  # noqa: BLE001 - it is raised where it is awaited
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True, name="asks Ray").start()
    try:
        return outcome.result(timeout_s)
    except TimeoutError:
        if outcome.done():  # it is the call's own
            raise
        _Abandoned.is_any = True
        raise TimeoutError(f"no answer for {timeout_s:.0f} s") from None
