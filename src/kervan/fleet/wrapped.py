"""Methods of running objects that are replaced for a while, so that who is not profiled pays nothing."""

from collections.abc import Callable
from typing import Any


class Wrapped:
    """Methods of objects, replaced on the objects until `restore`."""

    def __init__(self) -> None:
        self._replaced: list[tuple[Any, str, bool, Any]] = []

    def wrap(self, owner: Any, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Replace `owner.name` by `around(owner.name)`, if it is there."""
        method = getattr(owner, name, None)
        if method is not None:
            self._replaced.append((owner, name, name in vars(owner), method))
            setattr(owner, name, around(method))

    def restore(self) -> None:
        """Put all back, the last first."""
        while self._replaced:
            owner, name, was_own, method = self._replaced.pop()
            if was_own:
                setattr(owner, name, method)
            else:
                delattr(owner, name)
