"""Everything kervan raises on purpose.

KervanError
├── ConfigError      what was asked for is wrong; nothing has been started
├── CapacityError    what was asked for is right, but does not fit here
├── FleetError       a running fleet is missing, or in a state that forbids the request
└── EngineError      vLLM or Ray failed; chained from the cause

A message names the value, the broken rule with its arithmetic, and the nearest fix, in one sentence.
The command line prints it after "error:" and exits with 1; with 2 for a ConfigError, as for an option that it does not
have.
"""


class KervanError(Exception):
    """Base of all errors that kervan raises on purpose."""


class ConfigError(KervanError):
    """What was asked for is wrong; nothing has been started."""


class CapacityError(KervanError):
    """What was asked for is right, but does not fit on this cluster."""


class FleetError(KervanError):
    """A fleet is missing, or in a state that forbids the request."""


class EngineError(KervanError):
    """vLLM or Ray failed; `__cause__` has what they said."""
