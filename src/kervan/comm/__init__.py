"""How GPUs reach each other: collectives measured and checked, a host examined, a replica's start refused in time."""
