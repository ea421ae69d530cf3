"""`kervan profile`: what engines and gateways recorded, and what it says; pure but for `py_spy` (docs/profiling.md)."""
