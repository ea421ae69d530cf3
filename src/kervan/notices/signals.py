"""SIGTERM as a notice: what Kubernetes, systemd and a cloud's shutdown send before they kill."""

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Iterator

from kervan.errors import ConfigError
from kervan.notices.events import Notice
from kervan.notices.source import PushSource


class SigtermSource(PushSource):
    """A notice `lead_s` before the kill that follows SIGTERM, counted from the first one.

    Kubernetes kills `terminationGracePeriodSeconds` (30 by default) after the pod was told to end, of which some
    seconds are over before SIGTERM comes if the pod has a preStop hook.
    Source: https://kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle/#pod-termination
    """

    name = "signal"

    def __init__(self, *, node: str, lead_s: float = 25.0, wall: Callable[[], float] = time.time):
        super().__init__(node, wall=wall)
        self._lead_s = lead_s
        self._was_notified = False

    def notify(self) -> None:
        """Take note of the signal. Call it on the event loop, for example from a handler of your own."""
        if self._was_notified:
            return
        self._was_notified = True
        now_s = self.wall()
        self.put(
            Notice(
                kind="sigterm",
                source="signal",
                node=self.node,
                event_id="SIGTERM",
                deadline_s=now_s + self._lead_s,
                seen_s=now_s,
                is_certain=True,
                detail="SIGTERM",
            )
        )

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Handle SIGTERM of this process while inside. It no longer ends the process: that is the caller's to do then.

        Raises: ConfigError outside of the main thread, where Python lets nobody handle signals (a Ray actor's event
        loop is outside).
        """
        loop = asyncio.get_running_loop()
        before = signal.getsignal(signal.SIGTERM)
        try:
            loop.add_signal_handler(signal.SIGTERM, self.notify)
        except (ValueError, RuntimeError) as error:
            raise ConfigError(
                "SIGTERM can be watched from the main thread only; run the watcher there, or call notify() from the "
                "handler that the process has"
            ) from error
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGTERM)
            if before is not None:  # None: set by something that is not Python
                signal.signal(signal.SIGTERM, before)
