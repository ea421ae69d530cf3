"""What a simulated replica may be told to suffer from."""

from dataclasses import dataclass
from typing import Literal

FaultKind = Literal["slow", "hang", "crash", "kv-pressure", "none"]


@dataclass(frozen=True, slots=True)
class Fault:
    """`slow`: steps take `amount` times as long. `hang`: no further step. `crash`: the process dies after `amount` more
    tokens. `kv-pressure`: the share `amount` of the KV pool is gone. `none`: whole again.
    """

    kind: FaultKind
    amount: float = 0.0
