"""An account of what lives on a device: kinds of memory, taken and given back in the order of a training step."""

from collections import defaultdict
from dataclasses import dataclass, field


def _zeros() -> dict[str, float]:
    return defaultdict(float)


@dataclass
class Ledger:
    """Bytes by kind, now, at the moment of the highest sum, and the most that each kind had.

    A kind has a group and may have a detail: "activations:mlp".
    """

    now: dict[str, float] = field(default_factory=_zeros)
    at_peak: dict[str, float] = field(default_factory=_zeros)
    most: dict[str, float] = field(default_factory=_zeros)
    peak_bytes: float = 0.0
    phase: str = ""
    phase_peaks: dict[str, float] = field(default_factory=dict)
    peak_phase: str = ""
    total_bytes: float = 0.0

    def begin(self, phase: str) -> None:
        """What follows belongs to a phase of this name."""
        self.phase = phase
        self._note()

    def take(self, kind: str, size_bytes: float) -> None:
        """Allocate."""
        self.now[kind] += size_bytes
        self.total_bytes += size_bytes
        self.most[kind] = max(self.most[kind], self.now[kind])
        self._note()

    def free(self, kind: str, size_bytes: float) -> None:
        """Give back."""
        self.now[kind] -= size_bytes
        self.total_bytes -= size_bytes

    def pulse(self, kind: str, size_bytes: float) -> None:
        """Allocate and give back."""
        self.take(kind, size_bytes)
        self.free(kind, size_bytes)

    def _note(self) -> None:
        self.phase_peaks[self.phase] = max(self.phase_peaks.get(self.phase, 0.0), self.total_bytes)
        if self.total_bytes > self.peak_bytes:
            self.peak_bytes, self.peak_phase = self.total_bytes, self.phase
            self.at_peak = dict(self.now)


def grouped(kinds: dict[str, float]) -> dict[str, float]:
    """Sums by the part of a kind before the colon."""
    sums: dict[str, float] = {}
    for kind, size in kinds.items():
        group = kind.partition(":")[0]
        sums[group] = sums.get(group, 0.0) + size
    return sums
