"""Pure decisions: `decide(state) -> Decision(reason=...)`. No I/O, no clock, no randomness of their own."""
