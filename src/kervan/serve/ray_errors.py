"""What Ray raises, as errors of kervan."""

import contextlib
from collections.abc import Iterator

from kervan.errors import FleetError


@contextlib.contextmanager
def as_fleet_error(what: str) -> Iterator[None]:
    """Within the block Ray is asked for something; `what` says, as a clause, what has failed if it does not answer.

    Raises: FleetError in place of what Ray raises while an actor, its GCS or this process's connection is away.
    """
    from ray.exceptions import RayError

    try:
        yield
    except (RayError, RuntimeError, OSError) as error:  # timeouts are among them, Ray's and asyncio's
        first_line = next(iter(str(error).strip().splitlines()), "")[:200]
        reason = f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
        raise FleetError(f"{what} ({reason}); try again in a few seconds") from error
