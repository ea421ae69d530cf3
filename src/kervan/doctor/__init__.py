"""`kervan doctor`: whether this machine can run a fleet, and what to do where it cannot."""
