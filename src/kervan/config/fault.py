"""What a simulated replica may be told to suffer from."""

from dataclasses import dataclass
from typing import Literal

FaultKind = Literal["slow", "hang", "crash", "kv-pressure", "none"]


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault that a simulated replica suffers from until it gets another one."""

    kind: FaultKind
    """slow: steps take longer. hang: no further step. crash: the process dies. kv-pressure: a share of the KV pool is
    gone. none: whole again."""
    amount: float = 0.0
    """Of slow the factor, of crash the tokens until then, of kv-pressure the share, 0 to 1; else without a meaning."""
